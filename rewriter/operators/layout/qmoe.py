"""com.microsoft::QMoE (quant_type int): one expert's [N, K] projection as the operator's bytes, and back.

A projection of E experts is the stack of its experts along a new first axis, so everything here is about one expert;
only `shapes` speaks of the stack.
"""

from __future__ import annotations

from dataclasses import dataclass

from rewriter.errors import QuantizationError, nearest
from rewriter.graph.declines import OTHER_BLOCK_SIZE, Reason
from rewriter.operators.layout import cutlass
from rewriter.operators.layout.packing import (
    as_shape,
    codes_per_byte,
    default_zero_point,
    pack_codes,
    packed_width,
    unpack_codes,
)
from rewriter.quantize.types import CodeArray, FloatArray, QuantizedWeight

Shape = tuple[int, ...]


LAYOUT_KEY = "rewriter.layout"
"""Metadata of a node that holds its weights' layout, which neither shapes nor attributes tell: see `layout_name`."""


def layout_name(prepacked: int | None) -> str:
    """Returns ``raw``, ``cutlass-sm80`` or ``cutlass-sm90``."""
    return "raw" if prepacked is None else f"cutlass-sm{prepacked}"


def layout_of(name: str) -> int | None:
    """Inverse of `layout_name`: None for raw, else the architecture.

    Raises:
        QuantizationError: no such layout.
    """
    known = {layout_name(prepacked): prepacked for prepacked in (None, *cutlass.ARCHITECTURES)}
    if name not in known:
        raise QuantizationError(f"unknown weight layout '{name}'{nearest(name, known)}")
    return known[name]


@dataclass(frozen=True)
class QMoEArrays:
    """One expert's slice of what the operator reads for one projection.

    Attributes:
        weight: [N, K * bits / 8] uint8 raw, or [K, N * bits / 8] in the CUTLASS layout.
        scales: [N] where one scale covers the row, else [N, K / block].
        zero_points: [ceil(N * bits / 8)] (packed along N) or [N, ceil(K / block * bits / 8)] uint8, or None.
    """

    weight: CodeArray
    scales: FloatArray
    zero_points: CodeArray | None


def illegal(n: int, k: int, bits: int, block: int, *, prepacked: int | None = None) -> str | None:
    """Returns why the operator has no such projection, or None.

    Args:
        n: output features.
        k: input features.
        bits: width of a code.
        block: input features per scale; 0 is the whole row.
        prepacked: None for the raw layout, 80 or 90 for the CUTLASS layout of that architecture.
    """
    if bits not in (2, 4, 8):
        return f"bits is {bits}; QMoE takes 2, 4 or 8"
    if block and (block < 16 or block & (block - 1)):
        return Reason(f"block size {block} is not a power of two of at least 16, as QMoE needs", OTHER_BLOCK_SIZE)
    if block and k % block:
        return Reason(f"K = {k} is not divisible by the block size {block}, as QMoE needs", OTHER_BLOCK_SIZE)
    if k % codes_per_byte(bits):
        return f"a row of K = {k} codes of {bits} bits does not end on a byte, as QMoE needs"
    return None if prepacked is None else cutlass.illegal(n, k, bits, prepacked)


def shapes(
    experts: int, n: int, k: int, bits: int, block: int, *, symmetric: bool, prepacked: int | None = None
) -> tuple[Shape, Shape, Shape | None]:
    """Returns the shapes of weights, scales and zero points of a stack of E experts, [E, ...] each.

    Raises:
        QuantizationError: the operator has no such projection; see `illegal`.
    """
    weight, scales, zeros = _expert_shapes(n, k, bits, block, symmetric=symmetric, prepacked=prepacked)
    return (experts, *weight), (experts, *scales), None if zeros is None else (experts, *zeros)


def pack(q: QuantizedWeight, *, prepacked: int | None = None) -> QMoEArrays:
    """Lays one expert out for the operator; zero points past the last one are 2^(bits-1).

    Args:
        q: the expert's quantized [N, K] projection.
        prepacked: None for the raw layout, 80 or 90 for the CUTLASS layout of that architecture.

    Raises:
        QuantizationError: the operator has no such projection, or a code does not fit.
    """
    n, k = q.codes.shape
    _, scales_shape, zeros_shape = _expert_shapes(
        n, k, q.bits, q.block_size, symmetric=q.zero_points is None, prepacked=prepacked
    )
    weight = pack_codes(q.codes, q.bits) if prepacked is None else cutlass.pack(q.codes, q.bits, prepacked)
    zero_points = q.zero_points
    if zero_points is not None and zeros_shape is not None:
        rows = zero_points if len(zeros_shape) == 2 else as_shape(zero_points, (n,), "zero_points")
        zero_points = pack_codes(rows, q.bits, pad=default_zero_point(q.bits))
    return QMoEArrays(weight, as_shape(q.scales, scales_shape, "scales"), zero_points)


def unpack(
    arrays: QMoEArrays, n: int, k: int, bits: int, block: int, *, prepacked: int | None = None
) -> QuantizedWeight:
    """Reads one expert back; exact inverse of `pack`.

    Raises:
        QuantizationError: the arrays do not belong to such a projection.
    """
    weight_shape, scales_shape, zeros_shape = _expert_shapes(
        n, k, bits, block, symmetric=arrays.zero_points is None, prepacked=prepacked
    )
    weight = as_shape(arrays.weight, weight_shape, "weight")
    codes = unpack_codes(weight, bits, k) if prepacked is None else cutlass.unpack(weight, bits, prepacked)
    blocks = k // block if block else 1
    scales = as_shape(as_shape(arrays.scales, scales_shape, "scales"), (n, blocks), "scales")
    zero_points = None
    if arrays.zero_points is not None and zeros_shape is not None:
        packed = as_shape(arrays.zero_points, zeros_shape, "zero_points")
        zero_points = unpack_codes(packed, bits, blocks if len(zeros_shape) == 2 else n).reshape(n, blocks)
    return QuantizedWeight(codes, scales, zero_points, bits, block)


def _expert_shapes(
    n: int, k: int, bits: int, block: int, *, symmetric: bool, prepacked: int | None
) -> tuple[Shape, Shape, Shape | None]:
    if reason := illegal(n, k, bits, block, prepacked=prepacked):
        raise QuantizationError(reason)
    weight = (n, packed_width(k, bits)) if prepacked is None else cutlass.shape(n, k, bits)
    if not block:
        return weight, (n,), None if symmetric else (packed_width(n, bits),)
    blocks = k // block
    return weight, (n, blocks), None if symmetric else (n, packed_width(blocks, bits))
