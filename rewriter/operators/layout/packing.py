"""Codes of 2, 3, 4 or 8 bits packed into bytes along the last axis, low bits first."""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from rewriter.errors import QuantizationError
from rewriter.operators.layout.bits import pack_rows, unpack_rows
from rewriter.quantize.types import CodeArray

_Scalar = TypeVar("_Scalar", bound=np.generic)

_CHUNK = 1 << 17
"""Codes of 3 bits packed at a time: temporaries stay in cache and out of the memory budget."""


def codes_per_byte(bits: int) -> int:
    """Returns how many codes of ``bits`` share a byte.

    Raises:
        QuantizationError: ``bits`` is not 2, 4 or 8.
    """
    if bits not in (2, 4, 8):
        raise QuantizationError(f"codes of {bits} bits cannot be packed; bits must be 2, 4 or 8")
    return 8 // bits


def packed_width(k: int, bits: int) -> int:
    """Returns the bytes that ``k`` codes of ``bits`` take, the last one padded."""
    return -(-k * bits // 8)


def default_zero_point(bits: int) -> int:
    """Returns 2^(bits-1), the zero point that operators assume when none is given."""
    return 1 << (bits - 1)


def pack_codes(codes: CodeArray, bits: int, *, pad: int = 0) -> CodeArray:
    """Packs codes along the last axis, low bits first.

    Args:
        codes: [..., K] uint8, each below 2^bits.
        bits: 2, 3, 4 or 8.
        pad: code that fills the last byte of a row whose K is not a multiple of 8 / bits.

    Returns:
        [..., ceil(K * bits / 8)] uint8, a new array.

    Raises:
        QuantizationError: wrong bits or dtype, or a code that does not fit: it would overwrite its neighbour.
    """
    if bits == 3:
        return _pack_threes(codes)
    codes_per_byte(bits)
    _require_uint8(codes, "codes")
    width = packed_width(codes.shape[-1], bits)
    if bits == 8:
        return codes.copy(order="C")
    packed: CodeArray = np.empty((*codes.shape[:-1], width), np.uint8)
    if packed.size == 0:
        return packed
    if pack_rows(_rows(codes), bits, pad, packed.reshape(-1, width)) >> bits:
        raise QuantizationError(f"code {int(codes.max())} does not fit in {bits} bits")
    return packed


def unpack_codes(packed: CodeArray, bits: int, k: int) -> CodeArray:
    """Inverse of `pack_codes`; padding is dropped.

    Args:
        packed: [..., >= ceil(K * bits / 8)] uint8; bytes beyond K are ignored.
        bits: 2, 4 or 8.
        k: codes per row.

    Returns:
        [..., K] uint8, a new array.

    Raises:
        QuantizationError: wrong bits or dtype, or rows shorter than K.
    """
    if bits != 3:
        codes_per_byte(bits)
    _require_uint8(packed, "packed codes")
    width = packed_width(k, bits)
    if packed.shape[-1] < width:
        raise QuantizationError(f"{packed.shape[-1]} bytes a row cannot hold {k} codes of {bits} bits")
    if bits == 8:
        return packed[..., :k].copy(order="C")
    if bits == 3:
        return _unpack_threes(packed[..., :width], k)
    codes: CodeArray = np.empty((*packed.shape[:-1], k), np.uint8)
    if codes.size == 0:
        return codes
    unpack_rows(_rows(packed), bits, codes.reshape(-1, k))
    return codes


def _rows(array: CodeArray) -> CodeArray:
    """Returns rows for compiled loops: what is read only, and what is not, would each be compiled for."""
    rows = np.ascontiguousarray(array).reshape(-1, array.shape[-1]).view()
    rows.flags.writeable = False
    return rows


_TOGETHER = np.arange(8, dtype=np.uint32) * 3
"""Where each of eight codes of 3 bits begins in the 24 bits that they share."""


def _pack_threes(codes: CodeArray) -> CodeArray:
    """Packs codes of 3 bits, eight to three bytes; codes past the last are 0."""
    _require_uint8(codes, "codes")
    if codes.size and int(codes.max()) >> 3:
        raise QuantizationError(f"code {int(codes.max())} does not fit in 3 bits")
    k = codes.shape[-1]
    packed: CodeArray = np.empty((*codes.shape[:-1], packed_width(k, 3)), np.uint8)
    rows, out = codes.reshape(-1, k), packed.reshape(-1, packed_width(k, 3))
    for start in range(0, len(rows), step := max(1, _CHUNK // max(k, 1))):
        chunk = np.pad(rows[start : start + step], ((0, 0), (0, -k % 8))).astype("<u4")
        words = np.bitwise_or.reduce(chunk.reshape(len(chunk), -1, 8) << _TOGETHER, axis=-1).astype("<u4")
        three = words.view(np.uint8).reshape(len(chunk), -1, 4)[..., :3].reshape(len(chunk), -1)
        out[start : start + step] = three[:, : out.shape[1]]
    return packed


def _unpack_threes(packed: CodeArray, k: int) -> CodeArray:
    """Inverse of `_pack_threes`."""
    codes: CodeArray = np.empty((*packed.shape[:-1], k), np.uint8)
    rows, out = packed.reshape(-1, packed.shape[-1]), codes.reshape(-1, k)
    for start in range(0, len(rows), step := max(1, _CHUNK // max(k, 1))):
        chunk = rows[start : start + step]
        chunk = np.pad(chunk, ((0, 0), (0, -chunk.shape[1] % 3))).reshape(len(chunk), -1, 3)
        words = np.pad(chunk, ((0, 0), (0, 0), (0, 1))).view("<u4")
        out[start : start + step] = ((words >> _TOGETHER) & 7).astype(np.uint8).reshape(len(chunk), -1)[:, :k]
    return codes


def as_shape(array: npt.NDArray[_Scalar], shape: tuple[int, ...], what: str) -> npt.NDArray[_Scalar]:
    """Returns ``array`` with ``shape``: the same elements, whose axes an exporter may have flattened.

    Raises:
        QuantizationError: the number of elements differs.
    """
    if array.size != math.prod(shape):
        raise QuantizationError(f"{what} has shape {list(array.shape)}; the layout needs {list(shape)}")
    return array.reshape(shape)


def _require_uint8(array: npt.NDArray[np.generic], what: str) -> None:
    if array.dtype != np.uint8 or array.ndim == 0:
        raise QuantizationError(f"{what} must be a uint8 array of rank 1 or more; got {array.dtype}{list(array.shape)}")
