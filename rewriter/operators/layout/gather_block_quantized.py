"""com.microsoft::GatherBlockQuantized over uint8 data (gather_axis 0, quantize_axis last), and back.

Two forms. The *table*: rows packed whole, [V, K * bits / 8]; a stack of experts [E, N, K * bits / 8] is the same thing
stacked along a new first axis. And the *tied* form, whose data is MatMulNBits' own B [V, kb, blob], so that an
embedding and an output projection hold one tensor: there every block is a row of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from rewriter.errors import QuantizationError
from rewriter.graph.declines import OTHER_BLOCK_SIZE, Reason
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


@dataclass(frozen=True)
class GatherArrays:
    """What the operator reads.

    Attributes:
        data: [V, K * bits / 8] uint8; tied [V, K / block, block * bits / 8].
        scales: [V, ceil(K / block)]; tied [V, K / block, 1].
        zero_points: [V, ceil(ceil(K / block) * bits / 8)] uint8; tied [V, K / block, 1], one to a byte; or None.
    """

    data: CodeArray
    scales: FloatArray
    zero_points: CodeArray | None


def illegal(k: int, bits: int, block: int, *, tied: bool = False) -> str | None:
    """Returns why the operator has no such table, or None."""
    if bits not in (2, 4, 8):
        return f"bits is {bits}; GatherBlockQuantized takes 2, 4 or 8"
    if block < 16 or block & (block - 1):
        return Reason(
            f"block size {block} is not a power of two of at least 16, as GatherBlockQuantized needs", OTHER_BLOCK_SIZE
        )
    if k % codes_per_byte(bits):
        return f"a row of K = {k} codes of {bits} bits does not end on a byte, as GatherBlockQuantized needs"
    if tied and k % block:
        return Reason(
            f"K = {k} is not divisible by the block size {block}, as a table tied with MatMulNBits needs",
            OTHER_BLOCK_SIZE,
        )
    return None


def shapes(
    lead: Shape, k: int, bits: int, block: int, *, symmetric: bool, tied: bool = False
) -> tuple[Shape, Shape, Shape | None]:
    """Returns the shapes of data, scales and zero points.

    Args:
        lead: [V] of a table, [E, N] of a stack.
        k: features of a row.
        bits: width of a code.
        block: features per scale.
        symmetric: True for no zero points.
        tied: True for the form that shares MatMulNBits' B.

    Raises:
        QuantizationError: the operator has no such table; see `illegal`.
    """
    if reason := illegal(k, bits, block, tied=tied):
        raise QuantizationError(reason)
    blocks = -(-k // block)
    if tied:
        one = (*lead, blocks, 1)
        return (*lead, blocks, block * bits // 8), one, None if symmetric else one
    zero_points = None if symmetric else (*lead, packed_width(blocks, bits))
    return (*lead, packed_width(k, bits)), (*lead, blocks), zero_points


def pack(q: QuantizedWeight, *, tied: bool = False) -> GatherArrays:
    """Lays a quantized [V, K] table out for the operator; zero points past the last one are 2^(bits-1).

    Raises:
        QuantizationError: the operator has no such table, or a code or zero point does not fit.
    """
    v, k = q.codes.shape
    symmetric = q.zero_points is None
    data_shape, scales_shape, zeros_shape = shapes((v,), k, q.bits, q.block_size, symmetric=symmetric, tied=tied)
    zero_points = q.zero_points
    if zero_points is not None and zeros_shape is not None:
        rows = zero_points[..., None] if tied else zero_points
        zero_points = pack_codes(rows, q.bits, pad=default_zero_point(q.bits))
    data = pack_codes(q.codes, q.bits).reshape(data_shape)
    return GatherArrays(data, as_shape(q.scales, scales_shape, "scales"), zero_points)


def unpack(arrays: GatherArrays, v: int, k: int, bits: int, block: int, *, tied: bool = False) -> QuantizedWeight:
    """Reads a [V, K] table back; exact inverse of `pack`.

    Raises:
        QuantizationError: the arrays do not belong to such a table.
    """
    data_shape, scales_shape, zeros_shape = shapes(
        (v,), k, bits, block, symmetric=arrays.zero_points is None, tied=tied
    )
    blocks = -(-k // block)
    data = as_shape(arrays.data, data_shape, "data").reshape(v, -1)
    scales = as_shape(as_shape(arrays.scales, scales_shape, "scales"), (v, blocks), "scales")
    zero_points = None
    if arrays.zero_points is not None and zeros_shape is not None:
        packed = as_shape(arrays.zero_points, zeros_shape, "zero_points")
        zero_points = unpack_codes(packed, bits, 1 if tied else blocks).reshape(v, blocks)
    return QuantizedWeight(unpack_codes(data, bits, k), scales, zero_points, bits, block)
