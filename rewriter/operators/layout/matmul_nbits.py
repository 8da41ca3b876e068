"""com.microsoft::MatMulNBits: one [N, K] weight as B, scales and zero points, and back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rewriter.errors import QuantizationError
from rewriter.graph.declines import OTHER_BLOCK_SIZE, Reason
from rewriter.operators.layout import cutlass
from rewriter.operators.layout.packing import as_shape, default_zero_point, pack_codes, packed_width, unpack_codes
from rewriter.quantize.types import CodeArray, FloatArray, QuantizedWeight

Shape = tuple[int, ...]


@dataclass(frozen=True)
class MatMulNBitsArrays:
    """What the operator reads.

    Attributes:
        b: [N, ceil(K / block), block * bits / 8] uint8; codes past K are 0.
        scales: [N, ceil(K / block)] in the dtype of the activations.
        zero_points: [N, ceil(ceil(K / block) * bits / 8)] uint8, or None for 2^(bits-1) everywhere.
    """

    b: CodeArray
    scales: FloatArray
    zero_points: CodeArray | None


def illegal(n: int, k: int, bits: int, block: int, *, prepacked: int | None = None) -> str | None:
    """Returns why the operator has no such [N, K] weight, or None.

    Args:
        n: output features.
        k: input features.
        bits: width of a code.
        block: input features per scale.
        prepacked: None for the standard layout; 80 or 90 for the CUTLASS layout of that architecture, which the
            operator calls ``weight_prepacked`` 1 and 2.
    """
    if bits not in (2, 4, 8):
        return f"bits is {bits}; MatMulNBits takes 2, 4 or 8"
    if block < 16 or block & (block - 1):
        return Reason(
            f"block size {block} is not a power of two of at least 16, as MatMulNBits needs", OTHER_BLOCK_SIZE
        )
    if prepacked is None:
        return None
    if k % block:
        return Reason(
            f"K = {k} is not divisible by the block size {block}, as a prepacked MatMulNBits needs", OTHER_BLOCK_SIZE
        )
    return cutlass.illegal(n, k, bits, prepacked)


def shapes(n: int, k: int, bits: int, block: int, symmetric: bool) -> tuple[Shape, Shape, Shape | None]:
    """Returns the shapes of B, scales and zero points of an [N, K] weight.

    Raises:
        QuantizationError: the operator has no such bits or block size.
    """
    _require_legal(n, k, bits, block, None)
    blocks = -(-k // block)
    zero_points = None if symmetric else (n, packed_width(blocks, bits))
    return (n, blocks, block * bits // 8), (n, blocks), zero_points


def pack(q: QuantizedWeight, *, prepacked: int | None = None) -> MatMulNBitsArrays:
    """Lays a quantized [N, K] weight out for the operator; padding as ONNX Runtime's own quantizers write it.

    Codes past K are 0 and zero points past the last block 2^(bits-1). (For 2 bits and K not a multiple of 4 the
    runtime leaves stale codes past K, which no kernel reads; here they are 0 too.)

    Args:
        q: the quantized weight.
        prepacked: None for the standard layout; 80 or 90 for the CUTLASS layout, which keeps the shape of B.

    Raises:
        QuantizationError: the operator has no such bits or block size, or a code or zero point does not fit.
    """
    n, k = q.codes.shape
    b_shape, scales_shape, _ = shapes(n, k, q.bits, q.block_size, q.zero_points is None)
    _require_legal(n, k, q.bits, q.block_size, prepacked)
    packed = pack_codes(q.codes, q.bits) if prepacked is None else cutlass.pack(q.codes, q.bits, prepacked)
    padding = b_shape[1] * b_shape[2] - packed.size // n
    if padding:
        packed = np.pad(packed, ((0, 0), (0, padding)))
    zero_points = q.zero_points
    if zero_points is not None:
        zero_points = pack_codes(zero_points, q.bits, pad=default_zero_point(q.bits))
    scales = as_shape(q.scales, scales_shape, "scales")
    return MatMulNBitsArrays(packed.reshape(b_shape), scales, zero_points)


def unpack(
    arrays: MatMulNBitsArrays, n: int, k: int, bits: int, block: int, *, prepacked: int | None = None
) -> QuantizedWeight:
    """Reads the operator's arrays back; exact inverse of `pack`, also from flattened arrays as exporters write them.

    Raises:
        QuantizationError: the arrays do not belong to an [N, K] weight of these bits and block size.
    """
    b_shape, scales_shape, zeros_shape = shapes(n, k, bits, block, arrays.zero_points is None)
    codes = unpack_b(arrays.b, n, k, bits, block, prepacked=prepacked)
    scales = as_shape(arrays.scales, scales_shape, "scales")
    zero_points = None
    if arrays.zero_points is not None and zeros_shape is not None:
        packed = as_shape(arrays.zero_points, zeros_shape, "zero_points")
        zero_points = unpack_codes(packed, bits, b_shape[1])
    return QuantizedWeight(codes, scales, zero_points, bits, block)


def unpack_b(b: CodeArray, n: int, k: int, bits: int, block: int, *, prepacked: int | None = None) -> CodeArray:
    """Returns the [N, K] codes of B alone.

    Raises:
        QuantizationError: B does not belong to an [N, K] weight of these bits and block size.
    """
    _require_legal(n, k, bits, block, prepacked)
    if prepacked is not None:
        return cutlass.unpack(as_shape(b, cutlass.shape(n, k, bits), "B"), bits, prepacked)
    return unpack_codes(as_shape(b, (n, -(-k // block) * block * bits // 8), "B"), bits, k)


def _require_legal(n: int, k: int, bits: int, block: int, prepacked: int | None) -> None:
    if reason := illegal(n, k, bits, block, prepacked=prepacked):
        raise QuantizationError(reason)
