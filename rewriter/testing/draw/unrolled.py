"""Experts that are taken from one stack: every spelling of a static selection, and what stands in its way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir
from hypothesis import strategies as st
from onnx import TensorProto, helper

from rewriter.testing.draw.checked import checked
from rewriter.testing.draw.consumers import CONSUMERS, Product, consume
from rewriter.testing.draw.graph import DTYPES, FLOAT_TYPES, OPERANDS, Scope
from rewriter.testing.draw.model import OPSETS, draw_model
from rewriter.testing.draw.placements import PLACEMENTS
from rewriter.testing.draw.spellings import SELECTIONS, Stack, select, spellings

NAMES = ("named", "unnamed", "clash")
STACK_OBSTACLES = (
    "dynamic-index",
    "stack-read-whole",
    "stack-is-input",
    "stack-is-output",
    "output-in-chain",
    "half-stack",
)
"""What keeps a selection from being folded, or makes it subtle; each model has at most one."""


@checked()
@st.composite
def unrolled_experts(
    draw: st.DrawFn,
    *,
    max_experts: int = 5,
    max_size: int = 40,
    dtypes: Sequence[str] = DTYPES,
    placements: Sequence[str] = PLACEMENTS,
    selections: Sequence[str] = SELECTIONS,
    consumers: Sequence[str] = CONSUMERS,
    obstacles: Sequence[str] = STACK_OBSTACLES,
    names: Sequence[str] = NAMES,
    typed: bool | None = None,
    repeats: bool = True,
) -> ir.Model:
    """Draws sums of products of ``x`` [T, K] with experts that are taken from one constant stack ``W``.

    Args:
        draw: given by Hypothesis.
        max_experts: largest number of experts in the stack, and of products.
        max_size: largest K and N.
        dtypes: element types, of ``DTYPES``.
        placements: where the experts stand, of ``PLACEMENTS``.
        selections: how a matrix is taken from the stack, of ``SELECTIONS``.
        consumers: what multiplies, of ``CONSUMERS``.
        obstacles: what may stand in the way, of ``STACK_OBSTACLES``; at most one in a model, and often none.
        names: how nodes and values are named, of ``NAMES``.
        typed: whether values carry types and shapes; None draws that too.
        repeats: whether an expert may be taken more than once, in different spellings.
    """
    dtype = draw(st.sampled_from(dtypes))
    k, n = draw(st.integers(1, max_size)), draw(st.integers(1, max_size))
    count = draw(st.integers(1, max_experts))
    obstacle = draw(st.sampled_from(("", *obstacles)))
    transposed = draw(st.booleans())
    axis = draw(st.sampled_from((0, 0, 0, 1, 2)))
    rows, columns = (n, k) if transposed else (k, n)
    stored = "float16" if obstacle == "half-stack" else dtype
    stack = Stack("W", count, rows, columns, stored, axis)
    scope = Scope(draw(st.sampled_from(OPSETS)), operands=draw(st.sampled_from(OPERANDS)))
    naming = draw(st.sampled_from(names))

    def body(inner: Scope, x: str) -> str:
        inner.weight(stack.name, stack.shape, stored)
        which = st.lists(st.integers(0, count - 1), min_size=1, max_size=max_experts, unique=not repeats)
        products = []
        for expert in draw(which):
            consumer = draw(st.sampled_from(consumers))
            how = draw(spellings(selections))
            matrix = select(inner, stack, expert, how, rank3=consumer.startswith("matmul"))
            if obstacle == "output-in-chain":
                inner.expose(draw(st.sampled_from(matrix.chain)), stored)
            if stored != dtype:
                matrix = replace(matrix, name=inner.op("Cast", matrix.name, to=FLOAT_TYPES[dtype]))
            product = Product(matrix, n, dtype, how, consumer, transposed)
            products.append(consume(draw, inner, x, product))
            if draw(st.integers(0, 3)) == 3:
                products.append(consume(draw, inner, x, product))
        products += _obstruct(inner, stack, dtype, obstacle)
        if naming == "clash":
            products += _clash(inner, n, dtype)
        return inner.total(products)

    return draw_model(
        draw,
        scope,
        body,
        dtype,
        ["T", k],
        n,
        placements=placements,
        typed=typed,
        named=naming != "unnamed",
        weight=stack.name,
        obstacle=obstacle,
    )


def _obstruct(scope: Scope, stack: Stack, dtype: str, obstacle: str) -> list[str]:
    """Writes the other readers of the stack that the obstacle asks for; returns what is to be added to the output."""
    read = stack.name
    if obstacle == "dynamic-index":
        scope.inputs["i"] = helper.make_tensor_value_info("i", TensorProto.INT64, [])
        read = scope.op("Gather", stack.name, "i", axis=stack.axis)
    elif obstacle != "stack-read-whole":
        return []
    largest = scope.op("ReduceMax", read, keepdims=0)
    return [largest if stack.dtype == dtype else scope.op("Cast", largest, to=FLOAT_TYPES[dtype])]


def _clash(scope: Scope, n: int, dtype: str) -> list[str]:
    """Writes values that already have the names that a rule would choose."""
    bias = scope.weight("W__slice_0", (n,), dtype)
    return [scope.op("Identity", bias, name="W__slice_0__T"), scope.op("Identity", bias, name="W__slice_1")]
