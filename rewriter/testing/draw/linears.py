"""Sums of linear maps with a constant weight each, in float or quantized already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir
from hypothesis import strategies as st

from rewriter.operators import matmul_nbits
from rewriter.operators.layout.stored import Stored, by_name
from rewriter.quantize.types import QuantizedShape
from rewriter.testing.draw.checked import checked
from rewriter.testing.draw.consumers import CONSUMERS, Product, consume
from rewriter.testing.draw.graph import DTYPES, Scope
from rewriter.testing.draw.model import OPSETS, draw_model
from rewriter.testing.draw.packed import BITS, LAYOUTS, ZERO_POINTS, Packing, multiply
from rewriter.testing.draw.placements import PLACEMENTS
from rewriter.testing.draw.spellings import Matrix, spellings

WEIGHT_OBSTACLES = ("constant-node", "several-matrices", "weight-also-read", "weight-is-input", "weight-is-output")
"""What keeps a weight from being quantized, or makes it subtle; each model has at most one."""
SHARED_OBSTACLES = WEIGHT_OBSTACLES[2:]
"""Those that a weight of any kind may have."""
BLOCK_SIZES = (16, 32, 64)


@checked()
@st.composite
def projections(
    draw: st.DrawFn,
    *,
    max_size: int = 70,
    dtypes: Sequence[str] = DTYPES,
    placements: Sequence[str] = PLACEMENTS,
    consumers: Sequence[str] = CONSUMERS,
    obstacles: Sequence[str] = WEIGHT_OBSTACLES,
    typed: bool | None = None,
) -> ir.Model:
    """Draws sums of one to three linear maps of ``x`` [T, K], each with a constant weight.

    Args:
        draw: given by Hypothesis.
        max_size: largest K and N.
        dtypes: element types, of ``DTYPES``.
        placements: where the maps stand, of ``PLACEMENTS``.
        consumers: what multiplies, of ``CONSUMERS``.
        obstacles: what may stand in the way, of ``WEIGHT_OBSTACLES``; at most one in a model, and often none.
        typed: whether values carry types and shapes; None draws that too.
    """
    dtype = draw(st.sampled_from(dtypes))
    k, n = draw(st.integers(1, max_size)), draw(st.integers(1, max_size))
    obstacle = draw(st.sampled_from(("", *obstacles)))
    transposed = draw(st.booleans())
    shape: tuple[int, ...] = (n, k) if transposed else (k, n)
    rank = 2 if obstacle == "several-matrices" else draw(st.sampled_from((2, 2, 3)))
    scope = Scope(draw(st.sampled_from(OPSETS)), inline=obstacle == "constant-node")

    def body(inner: Scope, x: str) -> str:
        terms = []
        for number in range(draw(st.integers(1, 3))):
            consumer = draw(st.sampled_from(consumers))
            deep = rank == 3 and consumer.startswith("matmul")
            name = f"W{draw(st.integers(0, number))}{'_deep' if deep else ''}"
            inner.weight(name, (1, *shape) if deep else shape, dtype)
            product = Product(
                Matrix(name, 3 if deep else 2, (name,)), n, dtype, draw(spellings()), consumer, transposed
            )
            terms.append(consume(draw, inner, x, product))
        if obstacle == "several-matrices":
            rows = inner.op("Reshape", x, inner.ints(1, -1, k)) if draw(st.booleans()) else x
            both = inner.op("MatMul", rows, inner.weight("both", (2, k, n), dtype))
            terms.append(inner.op("ReduceMax", both, keepdims=0))
        if obstacle == "weight-also-read":
            terms.append(inner.op("ReduceMax", name, keepdims=0))
        return inner.total(terms)

    return draw_model(
        draw, scope, body, dtype, ["T", k], n, placements=placements, typed=typed, weight="W0", obstacle=obstacle
    )


@checked()
@st.composite
def quantized_projections(
    draw: st.DrawFn,
    *,
    max_size: int = 70,
    dtypes: Sequence[str] = DTYPES,
    placements: Sequence[str] = PLACEMENTS,
    bits: Sequence[int] = BITS,
    block_sizes: Sequence[int] = BLOCK_SIZES,
    zero_points: Sequence[str] = ZERO_POINTS,
    layouts: Sequence[str] = LAYOUTS,
    obstacles: Sequence[str] = SHARED_OBSTACLES,
    typed: bool | None = None,
) -> ir.Model:
    """Draws sums of one to three MatMulNBits of ``x`` [T, K], with or without a bias, which may share their weight.

    ONNX Runtime's CPU provider does not run those that hold B in the CUTLASS layout.

    Args:
        draw: given by Hypothesis.
        max_size: largest K and N.
        dtypes: element types of x and the scales, of ``DTYPES``.
        placements: where the maps stand, of ``PLACEMENTS``.
        bits: widths of a code, of ``BITS``.
        block_sizes: input features per scale, of ``BLOCK_SIZES``.
        zero_points: how they are stored, of ``ZERO_POINTS``.
        layouts: of B, of ``LAYOUTS``; raw where no other is legal.
        obstacles: what may stand in the way, of ``SHARED_OBSTACLES``; at most one in a model, and often none.
        typed: whether values carry types and shapes; None draws that too.
    """
    dtype = draw(st.sampled_from(dtypes))
    packing = Packing(
        draw(st.sampled_from(bits)), draw(st.sampled_from(block_sizes)), draw(st.sampled_from(zero_points))
    )
    if packing.bits == 8 and packing.zero_points == "float":
        packing = replace(packing, zero_points="packed")  # ONNX Runtime has no such kernel
    layout = draw(st.sampled_from(layouts))
    unit = packing.block if layout != "raw" and packing.block <= max_size else 1
    k, n = (unit * draw(st.integers(1, max_size // unit)) for _ in range(2))
    own = by_name(matmul_nbits.LAYOUTS, layout)
    if own is not None and isinstance(own.of(QuantizedShape(n, k, packing.bits, packing.block)), Stored):
        packing = replace(packing, layout=layout)
    obstacle = draw(st.sampled_from(("", *obstacles)))
    scope = Scope(draw(st.sampled_from(OPSETS)))

    def body(inner: Scope, x: str) -> str:
        terms = []
        for number in range(draw(st.integers(1, 3))):
            name = f"W{draw(st.integers(0, number))}"
            bias = inner.weight("bias", (n,), dtype) if draw(st.booleans()) else ""
            terms.append(multiply(inner, x, name, (n, k), packing, dtype, bias=bias))
        if obstacle == "weight-also-read":
            terms.append(inner.op("ReduceMax", f"{name}_scales", keepdims=0))
        return inner.total(terms)

    return draw_model(
        draw,
        scope,
        body,
        dtype,
        ["T", k],
        n,
        placements=placements,
        typed=typed,
        weight=f"W0_Q{packing.bits}",
        obstacle=obstacle,
    )
