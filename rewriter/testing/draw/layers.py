"""Whole Mixture-of-Experts layers in plain operators, their experts in float or quantized already."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from hypothesis import strategies as st

from rewriter.testing.draw.blocks import ROUTERS, Block, Router, write_block
from rewriter.testing.draw.checked import checked
from rewriter.testing.draw.combines import COMBINES, LOOPS, MISTAKES
from rewriter.testing.draw.graph import DTYPES, OPERANDS, Scope
from rewriter.testing.draw.model import MODERN, draw_model
from rewriter.testing.draw.packed import BITS, Packing
from rewriter.testing.draw.placements import PLACEMENTS
from rewriter.testing.draw.spellings import SELECTIONS, spellings

BLOCK_SIZES = (16, 32)


@checked(obstacles=MISTAKES)
@st.composite
def moe_models(
    draw: st.DrawFn,
    *,
    max_experts: int = 5,
    max_size: int = 20,
    max_layers: int = 2,
    dtypes: Sequence[str] = DTYPES,
    placements: Sequence[str] = PLACEMENTS,
    selections: Sequence[str] = SELECTIONS,
    routers: Sequence[str | Router] = ROUTERS,
    combines: Sequence[str] = COMBINES,
    obstacles: Sequence[str] = (),
    typed: bool | None = None,
) -> ir.Model:
    """Draws whole layers of ``x`` [T, H]: a router, every expert from constant stacks, and the sum of the chosen.

    Args:
        draw: given by Hypothesis.
        max_experts: largest number of experts.
        max_size: largest hidden and intermediate size.
        max_layers: largest number of layers, one after the other.
        dtypes: element types, of ``DTYPES``.
        placements: where the layers stand, of ``PLACEMENTS``.
        selections: how a matrix is taken from its stack, of ``SELECTIONS``.
        routers: how experts are chosen, of ``ROUTERS``; or a function that writes it: it gets a ``Scope``, the name of
            the float32 logits [T, E] and k, and returns the names of the weights and of the ids, both [T, k].
        combines: how the chosen are put together, of ``COMBINES``; loops are drawn from opset 18 on.
        obstacles: what makes a block another one, of ``MISTAKES``; each model has at most one.
        typed: whether values carry types and shapes; None draws that too.
    """
    count = draw(st.integers(1, max_experts))
    block = Block(
        experts=count,
        top_k=draw(st.integers(1, count)),
        hidden=draw(st.integers(1, max_size)),
        intermediate=draw(st.integers(1, max_size)),
        dtype=draw(st.sampled_from(dtypes)),
        router=draw(st.sampled_from(routers)),
        packed=draw(st.booleans()),
        transposed=draw(st.booleans()),
        gemm=draw(st.booleans()),
        spelling=draw(spellings(selections)),
        combine=draw(st.sampled_from(combines)),
        mistake=draw(st.sampled_from(("", *obstacles))),
    )
    return _layers(draw, block, max_layers, placements, typed)


@checked()
@st.composite
def quantized_experts(
    draw: st.DrawFn,
    *,
    max_experts: int = 4,
    max_blocks: int = 2,
    max_layers: int = 2,
    dtypes: Sequence[str] = DTYPES,
    placements: Sequence[str] = PLACEMENTS,
    routers: Sequence[str | Router] = ROUTERS,
    bits: Sequence[int] = BITS,
    block_sizes: Sequence[int] = BLOCK_SIZES,
    typed: bool | None = None,
) -> ir.Model:
    """Draws the layers of ``moe_models`` whose experts are MatMulNBits already, one node for each matrix.

    Args:
        draw: given by Hypothesis.
        max_experts: largest number of experts.
        max_blocks: largest number of blocks in a row; hidden and intermediate size are so many blocks, or not quite.
        max_layers: largest number of layers, one after the other.
        dtypes: element types of activations and scales, of ``DTYPES``.
        placements: where the layers stand, of ``PLACEMENTS``.
        routers: how experts are chosen, of ``ROUTERS``; or a function that writes it: it gets a ``Scope``, the name of
            the float32 logits [T, E] and k, and returns the names of the weights and of the ids, both [T, k].
        bits: widths of a code, of ``BITS``.
        block_sizes: input features per scale, of ``BLOCK_SIZES``.
        typed: whether values carry types and shapes; None draws that too.
    """
    count = draw(st.integers(1, max_experts))
    size = draw(st.sampled_from(block_sizes))
    blocks = st.integers(1, max_blocks)
    block = Block(
        experts=count,
        top_k=draw(st.integers(1, count)),
        hidden=size * draw(blocks),
        intermediate=size * draw(blocks) - draw(st.sampled_from((0, 0, 0, 2))),
        dtype=draw(st.sampled_from(dtypes)),
        router=draw(st.sampled_from(routers)),
        packed=draw(st.booleans()),
        packing=Packing(draw(st.sampled_from(bits)), size, draw(st.sampled_from(("none", "packed")))),
    )
    return _layers(draw, block, max_layers, placements, typed)


def _layers(draw: st.DrawFn, block: Block, max_layers: int, placements: Sequence[str], typed: bool | None) -> ir.Model:
    depth = draw(st.integers(1, max_layers))
    opsets = [opset for opset in MODERN if opset >= 18] if block.combine in LOOPS else MODERN
    scope = Scope(draw(st.sampled_from(opsets)), operands=draw(st.sampled_from(OPERANDS)))

    def body(inner: Scope, x: str) -> str:
        for layer in range(depth):
            x = write_block(inner, x, block, f"layers.{layer}." if depth > 1 else "")
        return x

    return draw_model(
        draw, scope, body, block.dtype, ["T", block.hidden], block.hidden, placements=placements, typed=typed
    )
