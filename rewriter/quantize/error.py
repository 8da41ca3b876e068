"""How far a quantized weight is from the weight it stands for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rewriter.quantize.compiling import compiled
from rewriter.quantize.formats import FORMATS
from rewriter.quantize.halves import Halves, widen
from rewriter.quantize.kernels import Codes, Floats
from rewriter.quantize.rows import floats, floats_or_halves, frozen, over_rows, over_stored_rows
from rewriter.quantize.types import FloatArray, QuantizedWeight


def relative_rms(weight: FloatArray, quantized: QuantizedWeight) -> float:
    """Returns ``|dequantized - weight| / |weight|`` in the Euclidean norm.

    Args:
        weight: [N, K] float32, float16 or bfloat16.
        quantized: what a quantizer made of it.

    Returns:
        0 where both are zero; infinity where only the weight is.
    """
    block = quantized.block_size or weight.shape[1]
    middle = np.array([[1 << (quantized.bits - 1)]], np.uint8)

    values = FORMATS[quantized.format].values
    if values is not None:
        return _relative_rms_of_floats(weight, quantized, np.array(values, np.float32))

    def sums(first: int, chunk: Floats | Halves) -> tuple[float, float]:
        rows = slice(first, first + len(chunk))
        scales = floats(quantized.scales[rows])
        zeros = middle if quantized.zero_points is None else np.ascontiguousarray(quantized.zero_points[rows])
        return squares(*floats_or_halves(chunk), np.ascontiguousarray(quantized.codes[rows]), scales, zeros, block)

    return _relative(over_stored_rows(weight, sums))


def _relative_rms_of_floats(weight: FloatArray, quantized: QuantizedWeight, values: Floats) -> float:
    def sums(first: int, chunk: Floats) -> tuple[float, float]:
        rows = slice(first, first + len(chunk))
        scales = quantized.scales[rows].astype(np.float32) * np.float32(quantized.global_scale)
        return float_squares(chunk, np.ascontiguousarray(quantized.codes[rows]), scales, values, quantized.block_size)

    return _relative(over_rows(weight, sums))


def _relative(parts: Sequence[tuple[float, float]]) -> float:
    error, total = (math.fsum(part[i] for part in parts) for i in (0, 1))
    if total == 0:
        return 0.0 if error == 0 else math.inf
    return math.sqrt(error / total)


SAMPLED = 512
"""Inputs on which an output error is measured, at most: more would take longer than they would tell."""


def relative_output_rms(weight: FloatArray, quantized: QuantizedWeight, inputs: Floats) -> float | None:
    """Returns ``|x (dequantized - weight)^T| / |x weight^T|`` over what the weight saw, in the Euclidean norm.

    Args:
        weight: [N, K] float32, float16 or bfloat16.
        quantized: what a quantizer made of it.
        inputs: [T, K] x; where there are more than ``SAMPLED``, as many are taken, evenly apart.

    Returns:
        None where it saw nothing, or nothing but what its output is zero for.
    """
    if not len(inputs):
        return None
    step = -(-len(inputs) // SAMPLED)
    x = np.asarray(inputs[::step], np.float64)
    exact = np.asarray(weight, np.float64)
    total = float(np.linalg.norm(x @ exact.T))
    error = float(np.linalg.norm(x @ (quantized.dequantize() - exact).T))
    return error / total if total else None


def equal(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> bool:
    """Whether two arrays have the same type, shape and bytes."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return bool(equal_bytes(_bytes(one), _bytes(other)))


def _bytes(array: npt.NDArray[Any]) -> Codes:
    return frozen(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


@compiled(inline=False)
def equal_bytes(one: Codes, other: Codes) -> bool:
    """Whether all bytes are the same."""
    differ = np.uint8(0)
    for i in range(one.size):
        differ = np.uint8(differ | np.uint8(one[i] ^ other[i]))
    return bool(differ == 0)


_WIDENED = 4096
"""Halves that are widened at a time."""

_LEAST, _MOST = np.float32(1e-18), np.float32(1e30)
"""Between these, the sum of a block's squares has lost nothing in float32."""


@compiled({"reassoc", "contract", "nsz"})
def squares(
    rows: Floats, halves: Halves, codes: Codes, scales: Floats, zeros: Codes, block: int
) -> tuple[float, float]:
    """Returns the sums of the squared error and of the squared weights of a chunk.

    Args:
        rows: [R, K] the weights; of no rows where ``halves`` has some.
        halves: [R, K] the weights as the bits of float16 numbers; of no rows where ``rows`` has some.
        codes: [R, K].
        scales: [R, B].
        zeros: [R, B], or [1, 1] for all.
        block: weights that share a scale; a last block may be shorter.
    """
    error, total, k = 0.0, 0.0, codes.shape[1]
    some = max(1, _WIDENED // k) if halves.shape[0] else codes.shape[0]
    widened, flat = np.empty((some if halves.shape[0] else 0, k), np.float32), halves.reshape(-1)
    for r in range(codes.shape[0]):
        if halves.shape[0] and r % some == 0:
            last = min(r + some, codes.shape[0])
            widen(flat[r * k : last * k], widened.reshape(-1)[: (last - r) * k])
        row = widened[r % some] if halves.shape[0] else rows[r]
        for b in range(scales.shape[1]):
            scale = scales[r, b]
            zero = np.float32(zeros[r, b] if zeros.size > 1 else zeros[0, 0])
            own, code = row[b * block : (b + 1) * block], codes[r, b * block : (b + 1) * block]
            rests, weights = np.float32(0), np.float32(0)
            for i in range(own.size):  # of a slice: any other index could be negative, which takes thrice as long
                rest = (np.float32(code[i]) - zero) * scale - own[i]
                rests += rest * rest
                weights += own[i] * own[i]
            if _LEAST < weights < _MOST and rests < _MOST:
                error, total = error + np.float64(rests), total + np.float64(weights)
                continue
            for i in range(own.size):  # squares that float32 has no room for
                value = np.float64(own[i])
                exact = (np.float32(code[i]) - zero) * scale - value
                error, total = error + exact * exact, total + value * value
    return error, total


@compiled({"reassoc", "contract", "nsz"})
def float_squares(rows: Floats, codes: Codes, scales: Floats, values: Floats, block: int) -> tuple[float, float]:
    """As ``squares`` where each code stands for one of the values."""
    error, total = 0.0, 0.0
    for r in range(rows.shape[0]):
        for b in range(scales.shape[1]):
            scale = scales[r, b]
            own, code = rows[r, b * block : (b + 1) * block], codes[r, b * block : (b + 1) * block]
            for i in range(own.size):
                value = np.float64(own[i])
                rest = values[code[i]] * scale - value
                error += rest * rest
                total += value * value
    return error, total
