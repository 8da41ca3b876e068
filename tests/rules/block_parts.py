"""How a block of experts may be written, and the graph that it is written into."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ELEMENT = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.float16): TensorProto.FLOAT16}

ROUTERS = (
    "softmax-topk-normalised", "softmax-topk", "topk-softmax", "sigmoid-normalised", "scaled", "table", "epsilon",
    "sigmoid-late",
)  # fmt: skip
GIVEN = (
    "biased", "biased-raw", "biased-epsilon", "biased-clipped", "biased-table", "masked", "softplus", "softplus-large",
    "late", "exponential",
)  # fmt: skip
ACTIVATIONS = (
    "swiglu",
    "clamped",
    "clamped-min-max",
    "gate-times-up-first",
    "silu",
    "relu",
    "gelu",
    "gelu-pow",
    "gelu-cubed",
    "quick",
    "plain",
    "written-out",
    "written-out-reciprocal",
    "written-out-quotient",
)
ON_CUDA = {"geglu": "geglu", "geglu-up-first": "geglu", "geglu-tanh": "geglu", "squared": "relu2", "pow": "relu2"}
"""Activations that only CUDA's operator has, and what it calls them."""
UNGATED = ("silu", "relu", "gelu", "gelu-pow", "gelu-cubed", "quick", "plain", "squared", "pow")
WEIGHTS = ("gather", "gather-transposed", "gather-rank1", "slice", "split", "own", "own-transposed")
COMBINES = (
    "mask-sum", "mask-first", "where", "slots", "terms-per-slot", "onehot", "equal-range", "scatter", "chosen",
    "chosen-left", "chosen-einsum", "chosen-einsum-sum", "dense", "dense-expand", "joined-sum",
    "joined-matmul", "joined-einsum", "joined-last", "joined-gathered", "slot-loop",
)  # fmt: skip
LOOPS = ("loop", "loop-flat", "loop-tokens-first")
STACKED = (
    "chosen", "chosen-left", "chosen-einsum", "chosen-einsum-sum", "dense", "dense-expand", "slot-loop",
)  # fmt: skip


@dataclass(frozen=True)
class Spelling:
    """How a block is written, and what is wrong with it (``broken``: nothing where it is empty)."""

    router: str = "softmax-topk-normalised"
    activation: str = "swiglu"
    weights: str = "gather"
    combine: str = "mask-sum"
    halves: str = "split"
    bias: bool = False
    seed: str = ""
    rank: int = 2
    experts: int = 4
    k: int = 2
    hidden: int = 8
    inter: int = 6
    dtype: str = "float32"
    shared: bool = False
    alias: bool = False
    broken: str = ""
    random: int = 0


@dataclass
class Graph:
    """A graph that is being written."""

    dtype: np.dtype[Any]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)

    def op(self, op_type: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        names = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        node = helper.make_node(op_type, inputs, names, name=f"n{len(self.nodes)}", domain=domain, **attributes)
        self.nodes.append(node)
        return names[0] if outputs == 1 else names

    def const(self, array: Any, dtype: Any = np.int64) -> str:
        array = np.asarray(array, dtype)
        for name, known in self.initializers.items():
            if known.dtype == array.dtype and known.shape == array.shape and np.array_equal(known, array):
                return name
        return self.weight(f"c{len(self.initializers)}", array)

    def number(self, value: float) -> str:
        return self.const(value, self.dtype)

    def weight(self, name: str, array: Any) -> str:
        self.initializers[name] = np.asarray(array)
        return name


class Part:
    """Writes a part of a block."""

    def __init__(self, g: Graph, how: Spelling, arrays: dict[str, Any], gated: bool) -> None:
        self.g, self.how, self.arrays, self.gated = g, how, arrays, gated
        self.inner = ""
        self.halves: dict[int, list[str]] = {}

    def _scattered(self, weights: str, chosen: str) -> str:
        g = self.g
        shape = g.op("Concat", g.op("Shape", chosen, end=-1), g.const([self.how.experts]), axis=0)
        sparse = self.how.combine == "scatter-softmax"
        empty = -np.inf if sparse and self.how.broken != "zero-seed" else 0.0
        seed = g.op("ConstantOfShape", shape, value=numpy_helper.from_array(np.full(1, empty, g.dtype)))
        reduction = {"reduction": "add"} if self.how.broken == "added" else {}
        scattered = g.op("ScatterElements", seed, chosen, weights, axis=-1, **reduction)
        return str(
            g.op("Softmax", scattered, axis=0 if self.how.broken == "softmax-axis" else -1) if sparse else scattered
        )
