"""The projections of an attention: packed or three, float or quantized already, biased or not."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir
from hypothesis import strategies as st

from rewriter.testing.draw.checked import checked
from rewriter.testing.draw.graph import DTYPES, OPERANDS, Scope, sizes, small_weight
from rewriter.testing.draw.model import MODERN, draw_model
from rewriter.testing.draw.packed import BITS, Packing, multiply
from rewriter.testing.draw.placements import PLACEMENTS

LINEARS = ("matmul", "gemm", "gemm-transB", "matmulnbits")
PACKINGS = ("separate", "split", "slices")
"""Three linears, or one whose output a Split or three Slices take apart."""
ATTENTION_BIASES = ("none", "after", "before", "inside")
"""Added to the linear, on its right or its left, or read by it where it is no MatMul."""
ATTENTION_OBSTACLES = ("odd-value", "output-also-read", "weight-is-input", "weight-is-output")
"""What keeps projections from being packed or taken apart, or makes it subtle; each model has at most one."""


@dataclass(frozen=True)
class _Linear:
    """How every projection is written.

    Attributes:
        k: input features.
        dtype: of x and float weights.
        lead: dimensions of x before K.
        kind: one of ``LINEARS``.
        bias: one of ``ATTENTION_BIASES``.
        packing: of the weights, where they are quantized.
    """

    k: int
    dtype: str
    lead: Sequence[int | str]
    kind: str
    bias: str
    packing: Packing

    def write(self, scope: Scope, x: str, name: str, n: int) -> str:
        """Writes one projection [.., N] of x [.., K]."""
        bias = "" if self.bias == "none" else scope.weight(f"{name}_bias", (n,), self.dtype)
        inside = bias if self.bias == "inside" and self.kind != "matmul" else ""
        if self.kind == "matmulnbits":
            out = multiply(scope, x, name, (n, self.k), self.packing, self.dtype, lead=self.lead, bias=inside)
        elif self.kind == "gemm-transB":
            weight = scope.constant(name, small_weight(name, (n, self.k), self.dtype, self.k))
            out = scope.op("Gemm", x, weight, *([inside] if inside else []), transB=1)
        else:
            weight = scope.constant(name, small_weight(name, (self.k, n), self.dtype, self.k))
            out = scope.op("MatMul" if self.kind == "matmul" else "Gemm", x, weight, *([inside] if inside else []))
        if inside or not bias:
            return out
        return scope.op("Add", bias, out) if self.bias == "before" else scope.op("Add", out, bias)


@checked()
@st.composite
def attention_projections(
    draw: st.DrawFn,
    *,
    max_size: int = 32,
    dtypes: Sequence[str] = DTYPES,
    placements: Sequence[str] = PLACEMENTS,
    packings: Sequence[str] = PACKINGS,
    linears: Sequence[str] = LINEARS,
    biases: Sequence[str] = ATTENTION_BIASES,
    bits: Sequence[int] = BITS,
    obstacles: Sequence[str] = ATTENTION_OBSTACLES,
    typed: bool | None = None,
) -> ir.Model:
    """Draws ``softmax(q @ k.T) @ v`` of three projections of ``x`` [T, K] or [B, T, K].

    Args:
        draw: given by Hypothesis.
        max_size: largest K, and output features of q, k and v each.
        dtypes: element types of x, scales and float weights, of ``DTYPES``.
        placements: where the attention stands, of ``PLACEMENTS``.
        packings: whether q, k and v are one linear, and what takes it apart, of ``PACKINGS``.
        linears: what multiplies, of ``LINEARS``.
        biases: what is added, of ``ATTENTION_BIASES``.
        bits: of a MatMulNBits, widths of a code, of ``BITS``.
        obstacles: what may stand in the way, of ``ATTENTION_OBSTACLES``; at most one in a model, and often none.
        typed: whether values carry types and shapes; None draws that too.
    """
    packed = draw(st.sampled_from(packings))
    kind = draw(st.sampled_from(linears))
    dtype = draw(st.sampled_from(dtypes))
    zeros = draw(st.sampled_from(("none", "packed", "flat")))
    linear = _Linear(
        draw(sizes(max_size)),
        dtype,
        ("T",) if kind.startswith("gemm") else draw(st.sampled_from((("T",), ("B", "T")))),
        kind,
        draw(st.sampled_from(biases)),
        Packing(draw(st.sampled_from(bits)), 16, zeros),
    )
    head, value = draw(sizes(max_size)), draw(sizes(max_size))
    obstacle = draw(st.sampled_from(("", *obstacles)))
    scope = Scope(draw(st.sampled_from(MODERN)), operands=draw(st.sampled_from(OPERANDS)))

    def body(inner: Scope, x: str) -> str:
        if packed == "separate":
            other = linear
            if obstacle == "odd-value":
                wider = replace(linear.packing, bits=4 if linear.packing.bits == 8 else 8)
                other = replace(linear, packing=wider, bias="after" if linear.bias == "none" else "none")
            q, k = (linear.write(inner, x, f"{letter}_proj", head) for letter in "qk")
            v = other.write(inner, x, "v_proj", value)
        else:
            whole = linear.write(inner, x, "qkv_proj", 2 * head + value)
            q, k, v = _take_apart(inner, whole, (head, head, value), packed)
        perm = [0, 2, 1] if len(linear.lead) > 1 else [1, 0]
        scores = inner.op("MatMul", q, inner.op("Transpose", k, perm=perm))
        y = inner.op("MatMul", inner.op("Softmax", scores, axis=-1), v)
        if obstacle != "output-also-read":
            return y
        return inner.op("Add", y, inner.op("ReduceMax", q if packed == "separate" else whole, keepdims=0))

    name = "q_proj" if packed == "separate" else "qkv_proj"
    weight = f"{name}_Q{linear.packing.bits}" if kind == "matmulnbits" else name
    return draw_model(
        draw,
        scope,
        body,
        dtype,
        [*linear.lead, linear.k],
        value,
        placements=placements,
        typed=typed,
        weight=weight,
        obstacle=obstacle,
    )


def _take_apart(scope: Scope, whole: str, lengths: tuple[int, int, int], how: str) -> list[str]:
    if how == "split":
        return scope.ops("Split", whole, scope.ints(*lengths), count=3, axis=-1)
    starts = [sum(lengths[:index]) for index in range(4)]
    last = scope.ints(-1)
    return [scope.op("Slice", whole, scope.ints(a), scope.ints(b), last) for a, b in itertools.pairwise(starts)]
