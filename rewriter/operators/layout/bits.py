"""Compiled loops over codes of 2 and 4 bits that share bytes, low bits first.

The width is a number where the loop is, and every step is held to a byte: so one instruction packs many codes.
"""

from __future__ import annotations

import numpy as np

from rewriter.quantize.compiling import compiled
from rewriter.quantize.types import CodeArray


@compiled()
def pack_row(codes: CodeArray, bits: int, packed: CodeArray) -> np.uint8:
    """Packs the codes that fill whole bytes; returns a number with every bit that some of them has."""
    per, seen = 8 // bits, np.uint8(0)
    for i in range(codes.size // per):
        byte = np.uint8(0)
        for j in range(per):
            code = codes[per * i + j]
            seen = np.uint8(seen | code)
            byte = np.uint8(byte | np.uint8(code << np.uint8(bits * j)))
        packed[i] = byte
    return seen


@compiled()
def unpack_row(packed: CodeArray, bits: int, codes: CodeArray) -> None:
    """Inverse of ``pack_row``."""
    per = 8 // bits
    for i in range(codes.size // per):
        for j in range(per):
            codes[per * i + j] = np.uint8((packed[i] >> np.uint8(bits * j)) & np.uint8((1 << bits) - 1))


@compiled(inline=False)
def pack_rows(codes: CodeArray, bits: int, pad: int, packed: CodeArray) -> np.uint8:
    """Packs rows.

    Args:
        codes: [N, K].
        bits: 2 or 4.
        pad: code that fills the last byte of a row.
        packed: [N, ceil(K * bits / 8)], written.

    Returns:
        A number with every bit that some code has.
    """
    k, per, seen = codes.shape[1], 8 // bits, np.uint8(0)
    for row in range(codes.shape[0]):
        if bits == 4:
            seen = np.uint8(seen | pack_row(codes[row], 4, packed[row]))
        else:
            seen = np.uint8(seen | pack_row(codes[row], 2, packed[row]))
        if k % per:
            byte = 0
            for j in range(per):
                code = codes[row, k - k % per + j] if j < k % per else pad
                seen, byte = np.uint8(seen | code), byte | code << (bits * j)
            packed[row, k // per] = np.uint8(byte)
    return seen


@compiled(inline=False)
def unpack_rows(packed: CodeArray, bits: int, codes: CodeArray) -> None:
    """Inverse of ``pack_rows``; rows of bytes may be longer."""
    k, per = codes.shape[1], 8 // bits
    for row in range(codes.shape[0]):
        if bits == 4:
            unpack_row(packed[row], 4, codes[row])
        else:
            unpack_row(packed[row], 2, codes[row])
        for j in range(k % per):
            codes[row, k - k % per + j] = np.uint8((packed[row, k // per] >> (bits * j)) & ((1 << bits) - 1))
