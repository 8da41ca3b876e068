"""A whole Mixture-of-Experts layer in plain operators: router, unrolled experts, and their weighted sum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import TensorProto

from rewriter.testing.draw.combines import Choice, combine
from rewriter.testing.draw.graph import FLOAT_TYPES, Scope
from rewriter.testing.draw.packed import Packing, multiply
from rewriter.testing.draw.spellings import Spelling, Stack, select, turn

Router = Callable[[Scope, str, int], tuple[str, str]]
"""Writes how k experts are chosen by float32 logits [T, E]; returns their weights and ids, both [T, k]."""

ROUTERS = ("softmax-topk", "topk-softmax", "sigmoid", "normalised", "sigmoid-normalised", "log-softmax", "hidden")


@dataclass(frozen=True)
class Block:
    """One way to write a layer.

    Attributes:
        experts: E, in the stacks.
        top_k: experts per token.
        hidden: H.
        intermediate: I.
        dtype: of activations and weights.
        router: one of ``ROUTERS``, or a function that writes one.
        packed: whether gate and up are one stack [E, H, 2I].
        transposed: whether matrices are stored [N, K].
        gemm: whether experts multiply with Gemm.
        spelling: how each expert's matrix is taken.
        packing: of the experts, each a MatMulNBits of its own; None for float stacks.
        combine: one of ``COMBINES``.
        mistake: one of ``MISTAKES``, or empty.
    """

    experts: int
    top_k: int
    hidden: int
    intermediate: int
    dtype: str
    router: str | Router
    packed: bool
    transposed: bool = False
    gemm: bool = False
    spelling: Spelling = field(default_factory=Spelling)
    packing: Packing | None = None
    combine: str = "mask-sum"
    mistake: str = ""


def write_block(scope: Scope, x: str, block: Block, prefix: str) -> str:
    """Writes the layer x [T, H] -> [T, H]; its weights' names begin with ``prefix``."""
    choice = Choice(block.experts, block.top_k, block.dtype, *_route(scope, x, block, prefix))

    def expert(rows: str, number: int) -> str:
        return _linear(scope, _activate(scope, rows, block, number, prefix), block, number, f"{prefix}down")

    return scope.op("Add", x, combine(scope, x, choice, expert, block.combine, block.mistake))


def _route(scope: Scope, x: str, block: Block, prefix: str) -> tuple[str, str]:
    """Returns the weights and the ids of the chosen experts, both [T, top_k]."""
    router = scope.weight(f"{prefix}router", (block.hidden, block.experts), block.dtype)
    if block.router == "hidden":
        x = scope.op(
            "Tanh", scope.op("MatMul", x, scope.weight(f"{prefix}router_in", (block.hidden,) * 2, block.dtype))
        )
    logits = scope.op("MatMul", x, router)
    if block.dtype != "float32":
        logits = scope.op("Cast", logits, to=TensorProto.FLOAT)
    values, chosen = _choose(scope, logits, block)
    if block.dtype != "float32":
        values = scope.op("Cast", values, to=FLOAT_TYPES[block.dtype])
    return values, chosen


def _choose(scope: Scope, logits: str, block: Block) -> tuple[str, str]:
    if not isinstance(block.router, str):
        return block.router(scope, logits, block.top_k)
    if block.router in ("softmax-topk", "normalised", "hidden"):
        logits = scope.op("Softmax", logits, axis=-1)
    elif block.router.startswith("sigmoid"):
        logits = scope.op("Sigmoid", logits)
    elif block.router == "log-softmax":
        logits = scope.op("LogSoftmax", logits, axis=-1)
    values, chosen = scope.ops("TopK", logits, scope.ints(block.top_k), count=2, axis=-1)
    if block.router == "topk-softmax":
        values = scope.op("Softmax", values, axis=-1)
    elif block.router == "log-softmax":
        values = scope.op("Exp", values)
    elif block.router.endswith("normalised"):
        values = scope.op("Div", values, scope.op("ReduceSum", values, scope.ints(-1), keepdims=1))
    return values, chosen


def _activate(scope: Scope, x: str, block: Block, expert: int, prefix: str) -> str:
    """Returns silu(x @ gate) * (x @ up), [T, I]."""
    if block.packed:
        both = _linear(scope, x, block, expert, f"{prefix}gate_up")
        half = scope.constant("halves", np.array([block.intermediate] * 2, dtype=np.int64))
        gate, up = scope.ops("Split", both, half, count=2, axis=-1)
    else:
        gate = _linear(scope, x, block, expert, f"{prefix}gate")
        up = _linear(scope, x, block, expert, f"{prefix}up")
    return scope.op("Mul", scope.op("Mul", gate, scope.op("Sigmoid", gate)), up)


def _linear(scope: Scope, x: str, block: Block, expert: int, name: str) -> str:
    k, n = block.hidden, block.intermediate
    if name.endswith("gate_up"):
        n = 2 * n
    elif name.endswith("down"):
        k, n = n, k
    if block.packing is not None:
        return multiply(scope, x, f"{name}.{expert}", (n, k), block.packing, block.dtype)
    rows, columns = (n, k) if block.transposed else (k, n)
    stack = Stack(name, block.experts, rows, columns, block.dtype)
    scope.weight(name, stack.shape, block.dtype)
    matrix = select(scope, stack, expert, block.spelling, rank3=False).name
    attributes: dict[str, Any] = {}
    if block.transposed and block.gemm:
        attributes["transB"] = 1
    elif block.transposed:
        matrix = turn(scope, matrix, block.spelling.turn)
    return scope.op("Gemm" if block.gemm else "MatMul", x, matrix, **attributes)
