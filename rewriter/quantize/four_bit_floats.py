"""Weights rounded to mxfp4 and nvfp4: the plain rule of the formats, or a search over neighbouring scales.

Plain mxfp4 puts the largest magnitude of a block between 4 and 8 times the scale; plain nvfp4 at 6 times the scale,
under a global scale that puts the largest of all at the largest number of e4m3. The search rounds the block with
neighbouring scales as well, and keeps that of the least squared error, weighted by the importance where one is given.

Source: OCP Microscaling Formats 1.0, 6.3; NVIDIA's description of nvfp4.
"""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np

from rewriter.errors import QuantizationError
from rewriter.quantize.compiling import compiled
from rewriter.quantize.formats import E2M1, FORMATS, MXFP4, Format
from rewriter.quantize.grids import E4M3_LARGEST, E8M0_BIAS
from rewriter.quantize.kernels import Codes, Floats, exponent_of, power_of_two
from rewriter.quantize.rows import checked_importance, over_rows
from rewriter.quantize.types import FloatArray, QuantizedWeight, WeightContext

LEVELS = np.array(E2M1, np.float32)
"""What each code of e2m1 stands for."""
E4M3 = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
"""What each code of e4m3 that is not negative stands for."""

_LOWER, _HIGHER = 8, 8
"""Codes of e4m3 below and above the plain one that are tried: half to twice its scale."""


def quantize(weight: FloatArray, context: WeightContext, *, search: bool) -> QuantizedWeight:
    """Rounds an [N, K] weight to the format of the context's spec.

    Args:
        weight: [N, K] float32, float16 or bfloat16.
        context: spec, importance and name.
        search: whether neighbouring scales are tried.

    Raises:
        QuantizationError: the weight is not finite.
    """
    own = FORMATS[context.spec.format]
    given = checked_importance(weight, replace(context, scale_dtype=weight.dtype))
    importance = np.ones(weight.shape[1], np.float32) if given is None else given
    assert own.block is not None and own.scale_dtype is not None
    n, k = weight.shape
    codes, scales = np.empty((n, k), np.uint8), np.empty((n, -(-k // own.block)), np.uint8)
    most = max(over_rows(weight, lambda _, chunk: float(np.abs(chunk).max(initial=0.0))), default=0.0)
    if not np.isfinite(most):
        raise QuantizationError(
            f"weight '{context.weight}' holds NaN or infinity; it cannot be quantized "
            "(quantization.exclude leaves it as it is)"
        )
    global_scale = 1.0
    if own is not MXFP4 and most:
        global_scale = float(np.float32(most / (E2M1[7] * E4M3_LARGEST)))

    def task(first: int, chunk: Floats) -> None:
        rows = slice(first, first + len(chunk))
        _fit(own, chunk, importance, global_scale, search, codes[rows], scales[rows])

    over_rows(weight, task)
    return QuantizedWeight(
        codes, scales.view(own.scale_dtype), None, 4, own.block, format=own.name, global_scale=global_scale
    )


def search_scales(
    block: Floats, importance: Floats, global_scale: float, dtype: np.dtype[np.generic], codes: Codes
) -> Floats:
    """Searches the scale of one block of several rows, as ``quantize`` does.

    Args:
        block: [R, C].
        importance: [C].
        global_scale: of the weight.
        dtype: of the scales: that of mxfp4, or of nvfp4.
        codes: [R, C], written.

    Returns:
        What the codes of each row are multiplied with, [R].
    """
    scales = np.empty((len(block), 1), np.uint8)
    own = next(known for known in FORMATS.values() if known.scale_dtype == dtype)
    _fit(own, block, importance, global_scale, True, codes, scales)
    found: Floats = scales.view(dtype)[:, 0].astype(np.float32) * np.float32(global_scale)
    return found


def _fit(
    own: Format, rows: Floats, importance: Floats, global_scale: float, search: bool, codes: Codes, scales: Codes
) -> None:
    if own is MXFP4:
        fit_mxfp4(rows, importance, search, codes, scales)
    else:
        fit_nvfp4(rows, importance, np.float64(global_scale), search, codes, scales)


@compiled()
def nearest_level(value: np.floating) -> np.uint8:
    """Returns the nearest code of e2m1, ties to even."""
    x = np.float64(abs(value))
    code = int(x > 0.25) + int(x >= 0.75) + int(x > 1.25) + int(x >= 1.75)
    code += int(x > 2.5) + int(x >= 3.5) + int(x > 5.0)
    return np.uint8(code + (8 if np.signbit(value) else 0))


@compiled()
def encode(block: Floats, scale: np.float64, codes: Codes) -> None:
    """Writes the nearest codes of e2m1, ties to even."""
    for i in range(block.size):
        codes[i] = nearest_level(block[i] / scale)


@compiled()
def error(block: Floats, importance: Floats, scale: np.float64, codes: Codes) -> np.float64:
    """Returns the weighted squared error of codes."""
    total = np.float64(0)
    for i in range(block.size):
        rest = LEVELS[codes[i]] * scale - block[i]
        total += importance[i] * rest * rest
    return total


@compiled()
def fit_mxfp4(rows: Floats, importance: Floats, search: bool, codes: Codes, scales: Codes) -> None:
    """Writes codes [R, K] and scales [R, B] in e8m0 of a chunk of rows."""
    tried = np.empty(32, np.uint8)
    for n in range(rows.shape[0]):
        for b in range(scales.shape[1]):
            part = slice(b * 32, (b + 1) * 32)
            block, own, weights = rows[n, part], codes[n, part], importance[part]
            most = np.max(np.abs(block))
            plain = min(max(exponent_of(most) - 3, -E8M0_BIAS), E8M0_BIAS) if most > 0 else 0
            encode(block, power_of_two(plain), own)
            scales[n, b] = plain + E8M0_BIAS
            if not search or most == 0:
                continue
            least = error(block, weights, power_of_two(plain), own)
            for exponent in (plain - 1, plain + 1):
                if abs(exponent) > E8M0_BIAS:
                    continue
                now = tried[: block.size]
                encode(block, power_of_two(exponent), now)
                this = error(block, weights, power_of_two(exponent), now)
                if this < least:
                    least = this
                    own[:] = now
                    scales[n, b] = exponent + E8M0_BIAS


@compiled()
def fit_nvfp4(
    rows: Floats, importance: Floats, global_scale: np.float64, search: bool, codes: Codes, scales: Codes
) -> None:
    """Writes codes [R, K] and scales [R, B] in e4m3 of a chunk of rows."""
    tried = np.empty(16, np.uint8)
    for n in range(rows.shape[0]):
        for b in range(scales.shape[1]):
            part = slice(b * 16, (b + 1) * 16)
            block, own, weights = rows[n, part], codes[n, part], importance[part]
            wanted = np.max(np.abs(block)) / (6 * global_scale)
            above = min(np.searchsorted(E4M3, np.float32(wanted)), E4M3.size - 1)
            plain = above
            if above > 0 and wanted - E4M3[above - 1] < E4M3[above] - wanted:
                plain = above - 1
            plain = max(plain, 1)
            scales[n, b] = plain
            encode(block, E4M3[plain] * global_scale, own)
            if not search or wanted == 0:
                continue
            least = error(block, weights, E4M3[plain] * global_scale, own)
            for code in range(max(plain - _LOWER, 1), min(plain + _HIGHER, E4M3.size - 1) + 1):
                now = tried[: block.size]
                encode(block, E4M3[code] * global_scale, now)
                this = error(block, weights, E4M3[code] * global_scale, now)
                if this < least:
                    least = this
                    own[:] = now
                    scales[n, b] = code
