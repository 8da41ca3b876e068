"""MoE blocks in plain operators: every spelling that the recognisers know, and one broken thing at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ELEMENT = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.float16): TensorProto.FLOAT16}

ROUTERS = (
    "softmax-topk-normalised", "softmax-topk", "topk-softmax", "sigmoid-normalised", "scaled", "table", "epsilon",
)  # fmt: skip
GIVEN = ("biased", "biased-raw", "biased-epsilon", "biased-clipped", "biased-table", "masked")
ACTIVATIONS = ("swiglu", "clamped", "clamped-min-max", "gate-times-up-first", "silu", "relu", "gelu", "quick", "plain")
WEIGHTS = ("gather", "gather-transposed", "gather-rank1", "slice", "split", "own", "own-transposed")
COMBINES = (
    "mask-sum", "mask-first", "where", "slots", "terms-per-slot", "onehot", "equal-range", "scatter", "chosen",
    "chosen-left", "chosen-einsum", "dense", "dense-expand",
)  # fmt: skip
STACKED = ("chosen", "chosen-left", "chosen-einsum", "dense", "dense-expand")


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


def block_model(how: Spelling) -> onnx.ModelProto:
    """Returns a model of one block: x [T, H] or [B, S, H] -> y."""
    rng = np.random.default_rng(how.random)
    dtype = np.dtype(how.dtype)
    g = Graph(dtype)
    e, h, i = how.experts, how.hidden, how.inter

    def random(name: str, *shape: int) -> np.ndarray[Any, Any]:
        return (rng.standard_normal(shape) * (0.5 if "bias" in name else 0.3)).astype(dtype)

    gated = how.activation not in ("silu", "relu", "gelu", "quick", "plain")
    arrays = {
        "gate": random("gate", e, i, h),
        "up": random("up", e, i, h),
        "down": random("down", e, h, i),
        "gate_bias": random("gate_bias", e, i),
        "up_bias": random("up_bias", e, i),
        "down_bias": random("down_bias", e, h),
    }
    x = g.op("Identity", "x") if how.alias else "x"
    logits = g.op("MatMul", x, g.weight("router", random("router", h, e) * 3))
    writer = _Writer(g, how, arrays, gated)
    weights, chosen = writer.route(logits)
    y = writer.stacked(x, weights, chosen) if how.combine in STACKED else writer.unrolled(x, weights, chosen)
    if how.shared:
        y = g.op("Add", y, g.op("MatMul", x, g.weight("shared", random("shared", h, h))))
    g.nodes.append(helper.make_node("Identity", [y], ["y"]))
    lead = ["T"] if how.rank == 2 else ["B", "S"]
    outputs = [helper.make_tensor_value_info("y", ELEMENT[dtype], [*lead, h])]
    if how.broken == "inner-output":
        outputs.append(helper.make_tensor_value_info(writer.inner, ELEMENT[dtype], None))
    if how.broken == "inner-read":
        g.nodes.append(helper.make_node("Relu", [writer.inner], ["seen"]))
        outputs.append(helper.make_tensor_value_info("seen", ELEMENT[dtype], None))
    graph = helper.make_graph(
        g.nodes,
        "block",
        [helper.make_tensor_value_info("x", ELEMENT[dtype], [*lead, h])],
        outputs,
        [numpy_helper.from_array(array, name) for name, array in g.initializers.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


class _Writer:
    """Writes the parts of a block."""

    def __init__(self, g: Graph, how: Spelling, arrays: dict[str, Any], gated: bool) -> None:
        self.g, self.how, self.arrays, self.gated = g, how, arrays, gated
        self.inner = ""
        self.halves: dict[int, list[str]] = {}

    # Routing.

    def route(self, logits: str) -> tuple[str, str]:
        g, how = self.g, self.how
        k = g.const([how.k])
        if how.router in GIVEN:
            return self._given(logits, k)
        before = {"topk-softmax": "", "sigmoid-normalised": "Sigmoid"}.get(how.router, "Softmax")
        axis = 0 if how.broken == "softmax-axis" else -1
        scores = logits
        if before:
            scores = g.op(before, logits, **({"axis": axis} if before == "Softmax" else {}))
        largest = 0 if how.broken == "smallest" else 1
        values, chosen = g.op("TopK", scores, k, outputs=2, axis=-1, largest=largest)
        if how.broken == "other-topk":
            values, _ = g.op("TopK", g.op("Softmax", g.op("Neg", logits), axis=-1), k, outputs=2, axis=-1)
        if how.router == "topk-softmax":
            values = g.op("Softmax", values, axis=-1)
        elif how.router == "softmax-topk":
            pass
        else:
            total = g.op("ReduceSum", values, g.const([-1]), keepdims=1)
            if how.router == "epsilon":
                total = g.op("Add", total, g.number(1e-20))
            if how.broken == "large-epsilon":
                total = g.op("Add", total, g.number(0.1))
            values = g.op("Div", values, total)
        if how.router == "scaled":
            values = g.op("Mul", values, g.number(2.5))
        if how.router == "table":
            table = g.const(np.linspace(0.5, 1.5, how.experts), self.g.dtype)
            values = g.op("Mul", values, g.op("Gather", table, chosen, axis=0))
        if how.broken == "raw-logits":
            values, chosen = g.op("TopK", logits, k, outputs=2, axis=-1)
        return values, chosen

    def _given(self, logits: str, k: str) -> tuple[str, str]:
        """Weights that are no function of what selects."""
        g, how = self.g, self.how
        if how.router == "masked":
            scores = g.op("Softmax", logits, axis=-1)
            masked = g.op("Where", g.op("Less", scores, g.number(0.05)), g.number(0.0), scores)
            return tuple(g.op("TopK", masked, k, outputs=2, axis=-1))  # type: ignore[return-value]
        scores = g.op("Sigmoid", logits) if how.broken != "negative" else g.op("Tanh", logits)
        shift = g.const(np.linspace(-0.3, 0.3, how.experts), g.dtype)
        _, chosen = g.op("TopK", g.op("Add", scores, shift), k, outputs=2, axis=-1)
        values = g.op("GatherElements", scores, chosen, axis=-1)
        if how.router == "biased-table":
            table = g.const(np.linspace(0.5, 1.5, how.experts), self.g.dtype)
            values = g.op("Mul", values, g.op("Gather", table, chosen, axis=0))
        elif how.router != "biased-raw":
            total = g.op("ReduceSum", values, g.const([-1]), keepdims=1)
            if how.router == "biased-epsilon":
                total = g.op("Add", total, g.number(0.25 if how.broken != "negative-epsilon" else -0.25))
            if how.router == "biased-clipped":
                total = g.op("Clip", total, g.number(1.5))
            values = g.op("Div", values, total)
        return g.op("Mul", values, g.number(2.5)), chosen

    # Experts, one at a time.

    def unrolled(self, x: str, weights: str, chosen: str) -> str:
        g, how = self.g, self.how
        experts = list(range(how.experts))
        if how.broken == "missing":
            experts.remove(1)
        if how.broken == "doubled":
            experts.append(1)
        total = self._seed(x)
        everyone = self._columns(weights, chosen)
        for position, expert in enumerate(experts):
            output = self._expert(x, expert, position)
            for share in self._shares(weights, chosen, everyone, expert, position):
                pair = (output, share) if position % 2 else (share, output)
                term = g.op("Mul", *pair)
                total = term if not total else g.op("Add", *((total, term) if position % 3 else (term, total)))
        return total

    def _seed(self, x: str) -> str:
        g, how = self.g, self.how
        if how.seed == "expand":
            return str(g.op("Expand", g.number(0.0), g.op("Shape", x)))
        if how.seed == "constant-of-shape":
            zero = numpy_helper.from_array(np.zeros(1, g.dtype))
            return str(g.op("ConstantOfShape", g.op("Shape", x), value=zero))
        if how.broken == "wide-seed":
            shape = g.op("Concat", g.const([3]), g.op("Shape", x), axis=0)
            return str(g.op("Expand", g.number(0.0), shape))
        return ""

    def _expert(self, x: str, expert: int, position: int) -> str:
        g, how = self.g, self.how
        own = expert
        if how.broken == "other-weight" and position == 2:
            own = 0
        if how.broken == "other-input" and position == 2:
            x = g.op("Add", x, x)
        gate, up = self._gate_up(x, own)
        features = self._activated(gate, up, odd=position == 2)
        if position == 1:
            self.inner = features
        output = g.op("MatMul", features, self._matrix("down", own))
        return str(g.op("Add", output, self._vector("down_bias", own)) if how.bias else output)

    def _gate_up(self, x: str, expert: int) -> tuple[str, str]:
        g, how = self.g, self.how
        if not self.gated or how.halves == "apart":
            gate = self._affine(x, "gate", expert)
            return gate, self._affine(x, "up", expert) if self.gated else ""
        both = g.op("MatMul", x, self._matrix("both", expert))
        if how.bias:
            both = g.op("Add", both, self._vector("both_bias", expert))
        if how.halves == "split":
            return tuple(g.op("Split", both, outputs=2, axis=-1, num_outputs=2))  # type: ignore[return-value]
        i = how.inter
        bounds = ((0, 2**62, 2), (1, 2**62, 2)) if how.halves == "interleaved" else ((0, i, 1), (i, 2 * i, 1))
        parts = [
            g.op("Slice", both, g.const([start]), g.const([end]), g.const([-1]), g.const([step]))
            for start, end, step in bounds
        ]
        return parts[0], parts[1]

    def _affine(self, x: str, name: str, expert: int) -> str:
        g = self.g
        if self.how.weights == "gather-rank1" and self.how.rank == 2:
            bias = [self._vector(f"{name}_bias", expert)] if self.how.bias else []
            matrix = g.op("Gather", self._stack(name, transposed=False), g.const(expert), axis=0)
            return str(g.op("Gemm", x, matrix, *bias, transB=1))
        product = g.op("MatMul", x, self._matrix(name, expert))
        return str(g.op("Add", product, self._vector(f"{name}_bias", expert)) if self.how.bias else product)

    def _array(self, name: str) -> Any:
        """[E, N, K], or [E, N] of a bias; gate and up together where they are."""
        if not name.startswith("both"):
            return self.arrays[name]
        gate, up = self.arrays[name.replace("both", "gate")], self.arrays[name.replace("both", "up")]
        if self.how.halves == "interleaved":
            return np.stack([gate, up], axis=2).reshape(gate.shape[0], -1, *gate.shape[2:])
        return np.concatenate([gate, up], axis=1)

    def _stack(self, name: str, *, transposed: bool) -> str:
        array = self._array(name)
        stack = f"stack_{name}"
        if stack not in self.g.initializers:
            self.g.weight(stack, np.swapaxes(array, 1, 2).copy() if transposed else array)
        return stack

    def _matrix(self, name: str, expert: int) -> str:
        """[K, N] of one expert."""
        g, how = self.g, self.how
        if how.broken == "input-weight" and name == "down" and expert == 1:
            return "x"
        if how.weights.startswith("own"):
            transposed = how.weights == "own-transposed"
            array = self._array(name)[expert]
            stored = g.weight(f"{name}_{expert}", array if transposed else array.T.copy())
            return str(g.op("Transpose", stored, perm=[1, 0])) if transposed else stored
        if how.weights == "slice":
            part = g.op("Slice", self._stack(name, transposed=True), g.const([expert]), g.const([expert + 1]))
            return str(g.op("Squeeze", part, g.const([0])))
        if how.weights == "split":
            if f"split_{name}" not in self.__dict__:
                count = how.experts
                stack = self._stack(name, transposed=True)
                self.__dict__[f"split_{name}"] = g.op("Split", stack, outputs=count, axis=0, num_outputs=count)
            return str(g.op("Squeeze", self.__dict__[f"split_{name}"][expert], g.const([0])))
        if how.weights == "gather-transposed":
            return str(g.op("Gather", self._stack(name, transposed=True), g.const(expert), axis=0))
        part = g.op("Gather", self._stack(name, transposed=False), g.const([expert]), axis=0)
        return str(g.op("Transpose", g.op("Squeeze", part, g.const([0]))))

    def _vector(self, name: str, expert: int) -> str:
        return str(self.g.op("Gather", self.g.weight(f"all_{name}", self._array(name)), self.g.const(expert), axis=0))

    def _activated(self, gate: str, up: str, *, odd: bool = False) -> str:
        g, how = self.g, self.how
        kind = how.activation
        if how.broken == "other-activation" and odd:
            kind = "clamped" if kind == "swiglu" else "swiglu"
        if how.broken == "swapped" and odd:
            gate, up = up, gate
        if how.broken == "erf-gelu":
            return str(g.op("Mul", g.op("Gelu", gate), up))
        if how.broken == "geglu":
            return str(g.op("Mul", g.op("Gelu", gate, approximate="tanh"), up))
        if how.broken == "tanh":
            return str(g.op("Mul", g.op("Tanh", gate), up))
        if kind == "swiglu":
            return str(g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up))
        if kind == "gate-times-up-first":
            return str(g.op("Mul", g.op("Sigmoid", gate), g.op("Mul", up, gate)))
        if kind.startswith("clamped"):
            return self._clamped(gate, up, as_clip=kind == "clamped")
        if kind == "silu":
            return str(g.op("Mul", gate, g.op("Sigmoid", gate)))
        if kind == "quick":
            return str(g.op("QuickGelu", gate, domain="com.microsoft", alpha=1.0))
        if kind == "gelu":
            return str(g.op("Gelu", gate, approximate="tanh"))
        return gate if kind == "plain" else str(g.op("Relu", gate))

    def _clamped(self, gate: str, up: str, *, as_clip: bool) -> str:
        g = self.g
        bound = -0.7 if self.how.broken == "negative-limit" else 0.7
        high, low = g.number(bound), g.number(-0.6 if self.how.broken == "uneven-limit" else -bound)
        if as_clip:
            gate, up = g.op("Clip", gate, "", high), g.op("Clip", up, low, high)
        else:
            gate, up = g.op("Min", gate, high), g.op("Max", g.op("Min", up, high), low)
        glu = g.op("Mul", gate, g.op("Sigmoid", g.op("Mul", gate, g.number(1.702))))
        return str(g.op("Mul", g.op("Add", up, g.number(1.0)), glu))

    # What an expert counts for.

    def _columns(self, weights: str, chosen: str) -> str:
        """[.., E], for the spellings that make it once."""
        g, how = self.g, self.how
        if how.combine in ("onehot", "equal-range"):
            wide = g.op("Unsqueeze", weights, g.const([-1]))
            if how.combine == "onehot":
                mask = g.op("OneHot", chosen, g.const(how.experts), g.const([0, 1], g.dtype), axis=-1)
            else:
                mask = g.op("Equal", g.op("Unsqueeze", chosen, g.const([-1])), g.const(range(how.experts)))
                mask = g.op("Cast", mask, to=ELEMENT[g.dtype])
            return str(g.op("ReduceSum", g.op("Mul", mask, wide), g.const([-2]), keepdims=0))
        if how.combine == "scatter":
            return self._scattered(weights, chosen)
        return ""

    def _scattered(self, weights: str, chosen: str) -> str:
        g = self.g
        shape = g.op("Concat", g.op("Shape", chosen, end=-1), g.const([self.how.experts]), axis=0)
        zeros = g.op("ConstantOfShape", shape, value=numpy_helper.from_array(np.zeros(1, g.dtype)))
        return str(g.op("ScatterElements", zeros, chosen, weights, axis=-1))

    def _shares(self, weights: str, chosen: str, everyone: str, expert: int, position: int) -> list[str]:
        g, how = self.g, self.how
        shown = 0 if how.broken == "other-share" and position == 2 else expert
        if everyone:
            return [g.op("Gather", everyone, g.const([shown]), axis=-1)]
        if how.combine in ("slots", "terms-per-slot"):
            slots = [self._slot(weights, chosen, shown, slot) for slot in range(how.k)]
            if how.broken == "missing-slot" and position == 1:
                slots.pop()
            if how.combine == "terms-per-slot":
                return slots
            total = slots[0]
            for slot in slots[1:]:
                total = g.op("Add", total, slot)
            return [total]
        mask = g.op("Equal", chosen, g.const(shown))
        if how.combine == "where":
            picked = g.op("Where", mask, weights, g.number(0.0))
        else:
            number = g.op("Cast", mask, to=ELEMENT[g.dtype])
            picked = g.op("Mul", *((number, weights) if how.combine == "mask-first" else (weights, number)))
        axis = 0 if how.broken == "sum-axis" and position == 1 else -1
        return [g.op("ReduceSum", picked, g.const([axis]), keepdims=1)]

    def _slot(self, weights: str, chosen: str, expert: int, slot: int) -> str:
        g = self.g
        other = (slot + 1) % self.how.k if self.how.broken == "crossed-slots" else slot
        bounds = [(g.const([s]), g.const([s + 1]), g.const([-1])) for s in (slot, other)]
        mask = g.op("Equal", g.op("Slice", chosen, *bounds[0]), g.const(expert))
        return str(g.op("Mul", g.op("Cast", mask, to=ELEMENT[g.dtype]), g.op("Slice", weights, *bounds[1])))

    # All experts, or the chosen ones, at once.

    def stacked(self, x: str, weights: str, chosen: str) -> str:
        return (
            self._dense(x, weights, chosen)
            if self.how.combine.startswith("dense")
            else self._chosen(x, weights, chosen)
        )

    def _both(self) -> list[str]:
        return ["both"] if self.gated and self.how.halves != "apart" else ["gate", "up"] if self.gated else ["gate"]

    def _parts(self, found: list[str], axis: int) -> tuple[str, str]:
        g, i = self.g, self.how.inter
        if len(found) == 2 or not self.gated:
            return found[0], found[-1]
        if self.how.halves == "split":
            return tuple(g.op("Split", found[0], outputs=2, axis=axis, num_outputs=2))  # type: ignore[return-value]
        inter = self.how.halves == "interleaved"
        bounds = ((0, 2**62, 2), (1, 2**62, 2)) if inter else ((0, i, 1), (i, 2 * i, 1))
        first, second = (
            g.op("Slice", found[0], g.const([a]), g.const([b]), g.const([axis]), g.const([s])) for a, b, s in bounds
        )
        return first, second

    def _dense(self, x: str, weights: str, chosen: str) -> str:
        """[E, T, ..]; x is [T, H]."""
        g, how = self.g, self.how
        rows = g.op("Unsqueeze", x, g.const([0]))
        if how.combine == "dense-expand":
            rows = g.op("Expand", rows, g.const([how.experts, 1, 1]))

        def linear(data: str, name: str) -> str:
            out = g.op("MatMul", data, self._stack(name, transposed=True))
            bias = f"{name}_bias"
            return str(g.op("Add", out, g.weight(bias, self._array(bias)[:, None])) if how.bias else out)

        gate, up = self._parts([linear(rows, name) for name in self._both()], -1)
        output = linear(self._activated(gate, up), "down")
        share = g.op("Transpose", self._scattered(weights, chosen), perm=[1, 0])
        mixed = g.op("Mul", output, g.op("Unsqueeze", share, g.const([-1])))
        return str(g.op("ReduceSum", mixed, g.const([0]), keepdims=0))

    def _chosen(self, x: str, weights: str, chosen: str) -> str:
        """[T * k, ..], or [T, k, ..] with Einsum; x is [T, H]."""
        g, how = self.g, self.how
        if how.broken == "other-choice":
            _, chosen = g.op("TopK", g.op("Neg", x), g.const([how.k]), outputs=2, axis=-1)
            chosen = g.op("Mod", chosen, g.const(how.experts))
        if how.combine == "chosen-einsum":
            return self._with_einsum(x, weights, chosen)
        ids = g.op("Unsqueeze", g.op("Reshape", chosen, g.const([-1])), g.const([-1]))
        rows = g.op("Expand", g.op("Unsqueeze", x, g.const([1])), g.const([1, how.k, 1]))
        rows = g.op("Reshape", rows, g.const([-1, how.hidden]))
        left = how.combine == "chosen-left"

        def linear(data: str, name: str) -> str:
            matrix = g.op("GatherND", self._stack(name, transposed=not left), ids)
            axis = -1 if left else 1
            data = g.op("Unsqueeze", data, g.const([axis]))
            out = g.op("MatMul", *((matrix, data) if left else (data, matrix)))
            out = g.op("Squeeze", out, g.const([axis]))
            if not how.bias:
                return str(out)
            return str(g.op("Add", out, g.op("GatherND", g.weight(f"{name}_b", self._array(f"{name}_bias")), ids)))

        gate, up = self._parts([linear(rows, name) for name in self._both()], -1)
        output = linear(self._activated(gate, up), "down")
        share = g.op("Unsqueeze", g.op("Reshape", weights, g.const([-1])), g.const([-1]))
        mixed = g.op("Reshape", g.op("Mul", output, share), g.const([-1, how.k, how.hidden]))
        return str(g.op("ReduceSum", mixed, g.const([1]), keepdims=0))

    def _with_einsum(self, x: str, weights: str, chosen: str) -> str:
        g, how = self.g, self.how

        def linear(data: str, name: str, equation: str) -> str:
            matrix = g.op("Gather", self._stack(name, transposed=False), chosen, axis=0)
            out = g.op("Einsum", data, matrix, equation=equation)
            if not how.bias:
                return str(out)
            bias = g.weight(f"{name}_b", self._array(f"{name}_bias"))
            return str(g.op("Add", out, g.op("Gather", bias, chosen, axis=0)))

        gate, up = self._parts([linear(x, name, "th,tkoh->tko") for name in self._both()], -1)
        output = linear(self._activated(gate, up), "down", "tko,tkho->tkh")
        mixed = g.op("Mul", output, g.op("Unsqueeze", weights, g.const([-1])))
        return str(g.op("ReduceSum", mixed, g.const([1]), keepdims=0))
