"""The CUTLASS mixed-GEMM layout of int4 and int8 weights, which CUDA's QMoE reads without repacking (sm80 and sm90).

The kernel's loads want, inside each group of 32 (int4) or 16 (int8) input features, an order that its tensor-core
fragments dictate, and its fast integer-to-half conversion wants each 32-bit word shuffled once more. The two compose
into one transposition: with the feature as (a, b) of shape (4, 8) for int4 or (2, 8) for int8, features are stored as
(b, a). Sm80 further interleaves 4 (int4) or 2 (int8) output features in tiles of 64 input features. Codes stay
unsigned: the signed detour that a description of the layout usually takes cancels itself.
"""

from __future__ import annotations

import numpy as np

from rewriter.errors import QuantizationError
from rewriter.operators.layout.packing import codes_per_byte
from rewriter.quantize.types import CodeArray

ARCHITECTURES = (80, 90)

_TILE = 64
"""Input features in one interleaved tile (sm80)."""

_LANES = 8
"""Consecutive input features that the permutation keeps apart by one group's height."""

_CHUNK = 1 << 17


def illegal(n: int, k: int, bits: int, sm: int) -> str | None:
    """Returns why an [N, K] weight has no such layout, or None."""
    if bits not in (4, 8):
        return f"bits is {bits}; the CUTLASS layout exists for 4 and 8"
    if sm not in ARCHITECTURES:
        return f"sm{sm} has no CUTLASS layout here; it exists for sm80 and sm90"
    k_multiple = _TILE if sm == 80 else 128 // bits
    if k % k_multiple:
        return f"K = {k} is not a multiple of {k_multiple}, as the int{bits} layout of sm{sm} needs"
    n_multiple = 64 // bits
    if n % n_multiple:
        return f"N = {n} is not a multiple of {n_multiple}, as the int{bits} layout needs"
    return None


def shape(n: int, k: int, bits: int) -> tuple[int, int]:
    """Returns the packed shape [K, N * bits / 8] of an [N, K] weight."""
    return k, n // codes_per_byte(bits)


def pack(codes: CodeArray, bits: int, sm: int) -> CodeArray:
    """Lays one expert's codes out for the kernel.

    Args:
        codes: [N, K] uint8, unsigned codes around 2^(bits-1), each below 2^bits.
        bits: 4 or 8.
        sm: 80 or 90.

    Returns:
        [K, N * bits / 8] uint8. The shape is nominal: the bytes run along the output feature first.

    Raises:
        QuantizationError: N, K, bits or sm has no such layout, or a code does not fit.
    """
    n, k = codes.shape
    _require_legal(n, k, bits, sm)
    row_bytes = k * bits // 8
    together = _interleaved(bits, sm)
    packed: CodeArray = np.empty(n * row_bytes, np.uint8)
    step = _rows_per_chunk(k, together)
    for start in range(0, n, step):
        rows = np.ascontiguousarray(codes[start : start + step])
        if rows.size and int(rows.max()) >> bits:
            raise QuantizationError(f"code {int(rows.max())} does not fit in {bits} bits")
        lanes = rows.view(np.uint64)  # eight codes at a time; a code below 2^bits never carries into its neighbour
        if bits == 4:
            pairs = lanes.reshape(-1, 2)
            lanes = pairs[:, 0] | (pairs[:, 1] << np.uint64(4))
        ordered = _zip_lanes(lanes.view(np.uint8))
        if together > 1:
            tiles = ordered.reshape(len(rows) // together, together, k // _TILE, _TILE * bits // 8)
            ordered = tiles.transpose(0, 2, 1, 3).reshape(-1)
        packed[start * row_bytes : (start + len(rows)) * row_bytes] = ordered
    return packed.reshape(shape(n, k, bits))


def unpack(packed: CodeArray, bits: int, sm: int) -> CodeArray:
    """Inverse of `pack`.

    Args:
        packed: [K, N * bits / 8] uint8.
        bits: 4 or 8.
        sm: 80 or 90.

    Returns:
        [N, K] uint8.

    Raises:
        QuantizationError: the shape, bits or sm has no such layout.
    """
    k, n = packed.shape[0], packed.shape[1] * codes_per_byte(bits)
    _require_legal(n, k, bits, sm)
    row_bytes = k * bits // 8
    together = _interleaved(bits, sm)
    flat = np.ascontiguousarray(packed).reshape(-1)
    codes: CodeArray = np.empty((n, k), np.uint8)
    step = _rows_per_chunk(k, together)
    for start in range(0, n, step):
        rows = min(step, n - start)
        ordered = flat[start * row_bytes : (start + rows) * row_bytes]
        if together > 1:
            tiles = ordered.reshape(rows // together, k // _TILE, together, _TILE * bits // 8)
            ordered = tiles.transpose(0, 2, 1, 3).reshape(-1)
        lanes = _unzip_lanes(ordered).view(np.uint64)
        if bits == 4:
            low = np.uint64(0x0F0F0F0F0F0F0F0F)
            lanes = np.stack((lanes & low, (lanes >> np.uint64(4)) & low), axis=-1).reshape(-1)
        codes[start : start + rows] = lanes.view(np.uint8).reshape(rows, k)
    return codes


def _zip_lanes(pairs: CodeArray) -> CodeArray:
    """[..., 2, 8] bytes, flat, to [..., 8, 2]."""
    halves = pairs.reshape(-1, 2, _LANES)
    words = halves[:, 1].astype("<u2")
    words <<= 8
    words |= halves[:, 0]
    return words.view(np.uint8).reshape(-1)


def _unzip_lanes(zipped: CodeArray) -> CodeArray:
    """[..., 8, 2] bytes, flat, to [..., 2, 8]."""
    words = zipped.view("<u2").reshape(-1, _LANES)
    halves: CodeArray = np.empty((len(words), 2, _LANES), np.uint8)
    halves[:, 0] = words.astype(np.uint8)
    halves[:, 1] = (words >> 8).astype(np.uint8)
    return halves.reshape(-1)


def _interleaved(bits: int, sm: int) -> int:
    """Returns how many output features are interleaved; 1 is none."""
    return 16 // bits if sm == 80 else 1


def _rows_per_chunk(k: int, together: int) -> int:
    return max(1, _CHUNK // (max(k, 1) * together)) * together


def _require_legal(n: int, k: int, bits: int, sm: int) -> None:
    if reason := illegal(n, k, bits, sm):
        raise QuantizationError(reason)
