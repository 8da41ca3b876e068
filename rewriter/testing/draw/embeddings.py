"""An embedding and an output projection: one table in every form that exporters write, two equal ones, or two."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from hypothesis import strategies as st
from onnx import TensorProto, helper

from rewriter.testing.draw.checked import checked
from rewriter.testing.draw.graph import DTYPES, OPERANDS, Scope, sizes, weight
from rewriter.testing.draw.linears import SHARED_OBSTACLES
from rewriter.testing.draw.model import MODERN, draw_model
from rewriter.testing.draw.packed import BITS, Packing, look_up, multiply
from rewriter.testing.draw.placements import PLACEMENTS

TYINGS = (
    "untied",
    "transposed-head",
    "gemm-head",
    "transposed-embedding",
    "equal",
    "equal-gemm",
    "unequal",
    "quantized",
)
"""How the two hold their tables: apart; one, turned for the one or the other; two of equal or nearly equal contents;
or the bytes of a MatMulNBits, reshaped for a GatherBlockQuantized."""
BLOCK_SIZE = 16


@checked()
@st.composite
def tied_embeddings(
    draw: st.DrawFn,
    *,
    max_vocabulary: int = 64,
    max_hidden: int = 32,
    dtypes: Sequence[str] = DTYPES,
    placements: Sequence[str] = PLACEMENTS,
    tyings: Sequence[str] = TYINGS,
    bits: Sequence[int] = BITS,
    obstacles: Sequence[str] = SHARED_OBSTACLES,
    typed: bool | None = None,
) -> ir.Model:
    """Draws ``(x + embedding[ids]) @ lm_head`` of ``x`` [T, H] and ``ids`` [T].

    Args:
        draw: given by Hypothesis.
        max_vocabulary: largest V.
        max_hidden: largest H; a quantized pair has a block at least.
        dtypes: element types of x, scales and float tables, of ``DTYPES``.
        placements: where both stand, of ``PLACEMENTS``.
        tyings: how they hold their tables, of ``TYINGS``.
        bits: of a quantized pair, widths of a code, of ``BITS``.
        obstacles: what may stand in the way, of ``SHARED_OBSTACLES``; at most one in a model, and often none.
        typed: whether values carry types and shapes; None draws that too.
    """
    tying = draw(st.sampled_from(tyings))
    vocabulary, hidden = draw(sizes(max_vocabulary)), draw(sizes(max_hidden))
    if tying == "quantized":
        hidden = BLOCK_SIZE * -(-hidden // BLOCK_SIZE)
    zeros = draw(st.sampled_from(("none", "packed")))
    packing = Packing(draw(st.sampled_from(bits)), BLOCK_SIZE, zeros)
    dtype = draw(st.sampled_from(dtypes))
    biased = draw(st.booleans())
    table = "lm_head" if tying == "transposed-embedding" else "embedding"
    if tying == "quantized":
        table = f"lm_head_Q{packing.bits}"
    obstacle = draw(st.sampled_from(("", *obstacles)))
    scope = Scope(draw(st.sampled_from(MODERN)), operands=draw(st.sampled_from(OPERANDS)))

    def body(inner: Scope, x: str) -> str:
        inner.inputs["ids"] = helper.make_tensor_value_info("ids", TensorProto.INT64, ["T"])
        y = _write_pair(inner, x, tying, (vocabulary, hidden), dtype, packing, biased=biased)
        if obstacle != "weight-also-read":
            return y
        read = "lm_head_scales" if tying == "quantized" else table
        return inner.op("Add", y, inner.op("ReduceMax", read, keepdims=0))

    return draw_model(
        draw,
        scope,
        body,
        dtype,
        ["T", hidden],
        vocabulary,
        placements=placements,
        typed=typed,
        weight=table,
        obstacle=obstacle,
    )


def _write_pair(
    scope: Scope, x: str, tying: str, size: tuple[int, int], dtype: str, packing: Packing, *, biased: bool
) -> str:
    """Writes an embedding [V, H] and an output projection of H features to V; returns the logits [T, V]."""
    v, h = size
    bias = scope.weight("bias", (v,), dtype) if biased else ""
    if tying == "quantized":
        x = scope.op("Add", x, look_up(scope, "ids", "lm_head", (v, h), packing, dtype))
        return multiply(scope, x, "lm_head", (v, h), packing, dtype, bias=bias)
    array = weight("embedding", (v, h), dtype)
    if tying == "transposed-embedding":
        head = scope.constant("lm_head", array.T)
        looked_up = scope.op("Transpose", head, perm=[1, 0])
    else:
        looked_up = head = scope.constant("embedding", array)
    x = scope.op("Add", x, scope.op("Gather", looked_up, "ids"))
    if tying in ("equal", "equal-gemm", "unequal"):
        if tying == "unequal":
            array = array.copy()
            array[-1, -1] += np.array(1 / 32, dtype)
        head = scope.constant("lm_head", array if tying == "equal-gemm" else array.T)
    elif tying == "untied":
        head = scope.weight("lm_head", (h, v), dtype)
    elif tying == "transposed-head":
        head = scope.op("Transpose", head, perm=[1, 0])
    if tying in ("gemm-head", "equal-gemm"):
        return scope.op("Gemm", x, head, *([bias] if bias else []), transB=1)
    logits = scope.op("MatMul", x, head)
    return scope.op("Add", logits, bias) if bias else logits
