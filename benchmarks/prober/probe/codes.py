"""Random quantized weights, the bytes that operators read, and the numbers that they stand for: NumPy alone.

The layouts are written here once more, from their descriptions and not with the rewriter's functions, so that a
measurement judges both the runtime and what the rewriter believes of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""What the 16 codes of a 4-bit float (e2m1) stand for."""


@dataclass(frozen=True)
class Weight:
    """A weight [.., N, K] in codes.

    Attributes:
        codes: [.., N, K].
        scales: [.., N, blocks], in the type in which they are stored; bytes of fp4's scales.
        zeros: [.., N, blocks], or None.
        value: [.., N, K] float64, what the codes stand for.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    value: np.ndarray


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Returns numbers as an element type holds them, as float32."""
    values = np.asarray(values, np.float32)
    if dtype == "FLOAT16":
        return values.astype(np.float16).astype(np.float32)
    if dtype == "BFLOAT16":
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return values


def stored(values: np.ndarray, dtype: str) -> bytes:
    """Returns the bytes of numbers in an element type."""
    values = np.ascontiguousarray(rounded(values, dtype))
    if dtype == "FLOAT16":
        return values.astype(np.float16).tobytes()
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes() if dtype == "BFLOAT16" else values.tobytes()


def integers(
    rng: np.random.Generator, shape: tuple[int, ...], bits: int, block: int, zeros: str, dtype: str, *, signed: bool
) -> Weight:
    """Makes a weight of integer codes; ``block`` 0 is the whole row, ``zeros`` is none, packed or float."""
    *lead, k = shape
    size = block or k
    blocks = -(-k // size)
    middle = 2 ** (bits - 1)
    codes = rng.integers(0, 2**bits, shape)
    spread = 3.5 / 2**bits / k**0.5
    scales = spread * (0.5 + rng.random((*lead, blocks)))
    if signed:
        scales *= np.where(rng.random(scales.shape) < 0.5, -1, 1)
    scales = rounded(scales, dtype)
    points = np.full((*lead, blocks), float(middle))
    if zeros != "none":
        points = middle + rng.integers(-(middle // 2), middle // 2 + 1, (*lead, blocks)).astype(float)
    if zeros == "float":
        points += 0.5
    spread_out = [np.repeat(a, size, axis=-1)[..., :k].astype(np.float64) for a in (points, scales)]
    value = (codes - spread_out[0]) * spread_out[1]
    return Weight(codes, scales, None if zeros == "none" else points, value)


def floats(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> Weight:
    """Makes a weight of 4-bit floats: mxfp4 (scales 2^e in blocks of 32) or nvfp4 (scales e4m3 in blocks of 16)."""
    *lead, k = shape
    block = 32 if kind == "mxfp4" else 16
    codes = rng.integers(0, 16, shape)
    if kind == "mxfp4":
        scales = rng.integers(121, 124, (*lead, k // block)).astype(np.uint8)
        factors = np.exp2(scales.astype(np.float64) - 127)
    else:
        scales = rng.integers(16, 32, (*lead, k // block)).astype(np.uint8)
        factors = (1 + (scales & 7) / 8) * np.exp2((scales >> 3).astype(np.float64) - 7)
    return Weight(codes, scales, None, FP4[codes] * np.repeat(factors, block, axis=-1))


def packed(codes: np.ndarray, bits: int, pad: int = 0) -> np.ndarray:
    """Packs the last dimension: low bits first, as one stream of bits, the end filled up with ``pad``."""
    missing = -codes.shape[-1] % (8 // np.gcd(bits, 8))
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, missing)], constant_values=pad)
    if bits in (2, 4, 8):
        parts = codes.astype(np.uint8).reshape(*codes.shape[:-1], -1, 8 // bits)
        return np.bitwise_or.reduce(parts << (bits * np.arange(8 // bits, dtype=np.uint8)), axis=-1)
    stream = (codes[..., None].astype(np.uint8) >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(stream.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")


def cutlass(codes: np.ndarray, bits: int, sm: int) -> np.ndarray:
    """Lays codes [N, K] out for CUTLASS' mixed GEMM, as [K, N * bits / 8] bytes.

    The input features of each group of 32 (4 bits) or 16 (8 bits) are permuted; each output feature's are kept
    together; on sm80 a few output features are interleaved in tiles of 64; in each 32-bit word the even codes come
    before the odd ones.
    """
    n, k = codes.shape
    group = 128 // bits
    order = [8 * b + 2 * a + c for a in range(4) for b in range(group // 8) for c in range(2)]
    rows = codes.reshape(n, k // group, group)[:, :, order].reshape(n, k)
    if sm == 80:
        together = 16 // bits
        rows = rows.reshape(n // together, together, k // 64, 64).transpose(0, 2, 1, 3)
    per_word = 32 // bits
    words = rows.reshape(-1, per_word)
    words = np.concatenate([words[:, 0::2], words[:, 1::2]], axis=1)
    return packed(words, bits).reshape(k, n * bits // 8)
