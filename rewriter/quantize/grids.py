"""Compiled: which codes and scale a block of a weight was made of, where rounding them gives that block exactly.

Nothing is fitted: a scale is read off the largest number of the block, which is one of a few multiples of it, and every
other number must then be a multiple too, as the weight's dtype rounds it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rewriter.quantize.compiling import compiled
from rewriter.quantize.kernels import Codes, Floats, Stored, exponent_of, power_of_two, to_stored

LEVELS = np.array([6.0, 4.0, 3.0, 2.0, 1.5, 1.0, 0.5], np.float32)
"""Magnitudes of e2m1, the largest first."""

CODE_OF_HALVES = np.array([0, 1, 2, 3, 4, 255, 5, 255, 6, 255, 255, 255, 7], np.uint8)
"""Code of e2m1 of each magnitude in halves; 255 for none."""

SURE = 64
"""Multiples up to this are read off a rounded number without doubt, in bfloat16 too."""

E8M0_LEAST, E8M0_MOST, E8M0_BIAS = -127, 127, 127
E4M3_LEAST, E4M3_LARGEST = -9, 448.0
"""Exponent of the least bit of e4m3, and its largest number."""

FLOAT32 = 24
"""Digits of float32: there a scale has been rounded once before its products are, together by less than two units."""

NEAR = 2.0**-7
"""By how much a rounded number and a guessed global scale may be off together, relatively."""

Off = tuple[int, int, int]
"""How many blocks are off a grid, and row and block of the first."""

Reach = npt.NDArray[np.float64]
"""The least and the largest that a global scale may be."""


@compiled()
def magnitudes(block: Floats) -> tuple[np.float32, np.float32]:
    """Returns the largest magnitude, NaN or infinity where there is one, and the least that is not 0."""
    most, least = np.float32(0), np.float32(np.inf)
    for i in range(block.size):
        value = abs(block[i])
        most = value if not value <= most else most
        least = value if 0 < value < least else least
    return most, least


@compiled()
def multiples(
    block: Floats, scale: np.float64, limit: int, weight: Stored, numbers: npt.NDArray[np.int32]
) -> tuple[bool, int, int]:
    """Writes the block as multiples of a scale.

    Returns:
        Whether each number is one, of at most ``limit`` in magnitude, and the least and the largest multiple.
    """
    low, high = 0, 0
    for i in range(block.size):
        number = int(np.rint(block[i] / scale))
        if abs(number) > limit:
            return False, low, high
        if to_stored(np.float32(number * scale), weight) != block[i]:
            if abs(number) <= SURE:
                return False, low, high
            # Where a dtype has no more digits than the number, rounding may have moved it by one.
            number += 1 if block[i] > number * scale else -1
            if abs(number) > limit or to_stored(np.float32(number * scale), weight) != block[i]:
                return False, low, high
        numbers[i] = number
        low, high = min(low, number), max(high, number)
    return True, low, high


@compiled()
def rounded_from(value: np.float64, weight: Stored) -> tuple[np.float64, np.float64]:
    """Returns the least and the largest number that a positive number is rounded from."""
    exponent = exponent_of(np.float32(value))
    unit = power_of_two(max(exponent - weight[0], weight[1]))
    if weight[0] == FLOAT32:
        return value - 2 * unit, value + 2 * unit
    below = unit / 2 if value == power_of_two(exponent - 1) else unit
    return value - below / 2, value + unit / 2


@compiled()
def between(block: Floats, scale: np.float64, weight: Stored) -> np.float64:
    """Returns the middle of the scales of which all numbers may be rounded multiples; 0 where there are none."""
    low, high = np.float64(0), np.float64(np.inf)
    for i in range(block.size):
        value = np.float64(abs(block[i]))
        number = np.rint(value / scale)
        if number > 0:
            least, most = rounded_from(value, weight)
            low, high = max(low, least / number), min(high, most / number)
    return (low + high) / 2 if low <= high < np.inf else np.float64(0)


@compiled()
def _with_scale(
    block: Floats,
    most: np.float32,
    count: int,
    limit: int,
    top: int,
    symmetric: bool,
    weight: Stored,
    scales: Stored,
    numbers: npt.NDArray[np.int32],
    codes: Codes,
) -> tuple[bool, np.float32, int]:
    """As ``read_integers`` where the largest number is ``count`` times the scale."""
    half = (top + 1) // 2
    digits = min(weight[0], scales[0])
    nearest = np.float64(to_stored(np.float32(most / count), (digits, scales[1])))
    unit = power_of_two(max(exponent_of(np.float32(nearest)) - digits, scales[1]))
    for step in range(4 if digits < scales[0] else 3):
        if step < 3:
            scale = nearest + (step if step < 2 else -1) * unit
        else:  # a longer one than the numbers are
            scale = np.float64(to_stored(np.float32(between(block, np.float64(most / count), weight)), scales))
        if scale <= 0 or to_stored(np.float32(count * scale), weight) != most:
            continue
        found, low, high = multiples(block, scale, limit, weight, numbers)
        if not found or high - low > top:
            continue
        sign, zero = 1, -low
        if symmetric:
            sign, zero = (1 if high < half else -1), half
            if (low if sign > 0 else -high) < -half or (high if sign > 0 else -low) >= half:
                continue
        for i in range(block.size):
            codes[i] = np.uint8(sign * numbers[i] + zero)
        return True, np.float32(sign * scale), zero
    return False, np.float32(0), 0


@compiled()
def read_integers(
    block: Floats,
    top: int,
    symmetric: bool,
    weight: Stored,
    scales: Stored,
    numbers: npt.NDArray[np.int32],
    codes: Codes,
) -> tuple[bool, np.float32, int]:
    """Writes the codes of a block of integers times one scale.

    Args:
        block: the numbers.
        top: the largest code.
        symmetric: whether the zero point is 2^(bits-1).
        weight: dtype of the numbers.
        scales: dtype of the scale.
        numbers: scratch, of the block's size.
        codes: written.

    Returns:
        Whether it is such a block, its scale (negative where the largest multiple is +2^(bits-1)), and its zero point.
    """
    half = (top + 1) // 2
    most, least = magnitudes(block)
    if most == 0:
        codes[:] = half if symmetric else 0
        return True, np.float32(0), half if symmetric else 0
    if not most < np.inf:
        return False, np.float32(0), 0
    limit = half if symmetric else top
    ratio = np.float64(most) / np.float64(least)
    last = 0
    for smaller in range(1, limit + 1):  # the least number is so many times the scale, and the largest ``count`` times
        middle = int(np.rint(ratio * smaller)) if ratio * smaller < 2 * limit else 2 * limit
        if middle - 1 > limit:
            break
        for count in range(max(middle - 1, last + 1), min(middle + 1, limit) + 1):
            last = count
            found, scale, zero = _with_scale(block, most, count, limit, top, symmetric, weight, scales, numbers, codes)
            if found:
                return True, scale, zero
    return False, np.float32(0), 0


@compiled()
def read_e2m1(block: Floats, scale: np.float64, codes: Codes) -> bool:
    """Writes the codes of a block of e2m1 times a scale; whether it is one, without any rounding."""
    for i in range(block.size):
        halves = 2 * abs(np.float64(block[i])) / scale
        index = int(halves) if halves <= 12 else 255
        if index > 12 or halves != index or CODE_OF_HALVES[index] == 255:
            return False
        codes[i] = CODE_OF_HALVES[index] + np.uint8(8 if np.signbit(block[i]) else 0)
    return True


@compiled()
def read_mxfp4(block: Floats, codes: Codes) -> tuple[bool, int]:
    """Writes the codes of a block of e2m1 times a power of two; whether it is one, and the scale's code in e8m0."""
    most, _ = magnitudes(block)
    if most == 0:
        read_e2m1(block, np.float64(1), codes)
        return True, E8M0_BIAS
    if not most < np.inf:
        return False, 0
    for level in range(LEVELS.size):
        exponent = exponent_of(np.float32(most / LEVELS[level])) - 1
        if power_of_two(exponent) * LEVELS[level] != most or not E8M0_LEAST <= exponent <= E8M0_MOST:
            continue
        if read_e2m1(block, power_of_two(exponent), codes):
            return True, exponent + E8M0_BIAS
    return False, 0


@compiled()
def read_nvfp4(block: Floats, unit: np.float64, weight: Stored, codes: Codes, reach: Reach) -> tuple[bool, int]:
    """Writes the codes of a block of e2m1 times a number of e4m3 times a global scale near ``unit``.

    Products of e2m1 and e4m3 lie a 64th apart, far more than numbers are rounded by and ``unit`` may be off.

    Returns:
        Whether it is one, and the code of its scale in e4m3.
    """
    most, _ = magnitudes(block)
    if most == 0:
        read_e2m1(block, np.float64(1), codes)
        return True, 0
    if not most < np.inf:
        return False, 0
    for level in range(LEVELS.size):
        scale = np.float64(most) / (LEVELS[level] * unit)
        exponent = max(exponent_of(np.float32(scale)) - 4, E4M3_LEAST)
        digits = int(np.rint(scale / power_of_two(exponent)))
        near = digits * power_of_two(exponent)
        if digits == 0 or near > E4M3_LARGEST or abs(near - scale) > NEAR * scale:
            continue
        low, high = reach
        found = True
        for i in range(block.size):
            value = np.float64(abs(block[i]))
            halves = int(np.rint(2 * value / (near * unit)))
            found = halves <= 12 and CODE_OF_HALVES[halves] != 255 and (halves > 0 or value == 0)
            if not found:
                break
            codes[i] = CODE_OF_HALVES[halves] + np.uint8(8 if np.signbit(block[i]) else 0)
            if halves:
                product = halves * near / 2
                least, largest = rounded_from(value, weight)
                low, high = max(low, least / product), min(high, largest / product)
                found = low <= high
                if not found:
                    break
        if found:
            reach[0], reach[1] = low, high
            return True, 8 * (exponent - E4M3_LEAST) + digits
    return False, 0


@compiled()
def read_integer_rows(
    rows: Floats,
    block: int,
    top: int,
    symmetric: bool,
    weight: Stored,
    stored: Stored,
    patience: int,
    codes: Codes,
    scales: Floats,
    zeros: Codes,
) -> Off:
    """Reads a chunk of rows [R, K] of integers times scales [R, B].

    Args:
        rows: the numbers.
        block: of one scale.
        top: the largest code.
        symmetric: whether the zero point is 2^(bits-1).
        weight: dtype of the numbers.
        stored: dtype of the scales.
        patience: how many blocks may be off the grid before the rest is not looked at.
        codes: written.
        scales: written.
        zeros: written.

    Returns:
        How many blocks are off the grid, and row and block of the first; -1 and -1 where none is.
    """
    numbers = np.empty(min(block, rows.shape[1]), np.int32)
    off, row, first = 0, -1, -1
    for n in range(rows.shape[0]):
        for b in range(scales.shape[1]):
            part = slice(b * block, (b + 1) * block)
            values = rows[n, part]
            found, scale, zero = read_integers(
                values, top, symmetric, weight, stored, numbers[: values.size], codes[n, part]
            )
            scales[n, b], zeros[n, b] = scale, zero
            if not found:
                row, first = (n, b) if off == 0 else (row, first)
                off += 1
                if off > patience:
                    return off, row, first
    return off, row, first


@compiled()
def read_float_rows(
    rows: Floats, block: int, unit: np.float64, weight: Stored, patience: int, codes: Codes, scales: Codes, reach: Reach
) -> Off:
    """As ``read_integer_rows`` for mxfp4, in blocks of 32, and nvfp4, in blocks of 16.

    The scales are codes of e8m0, or of e4m3 under a global scale near ``unit``; then ``reach`` [2] is narrowed to the
    global scales that the numbers of all blocks are rounded from.
    """
    off, row, first = 0, -1, -1
    for n in range(rows.shape[0]):
        for b in range(scales.shape[1]):
            part = slice(b * block, (b + 1) * block)
            if block == 32:
                found, scale = read_mxfp4(rows[n, part], codes[n, part])
            else:
                found, scale = read_nvfp4(rows[n, part], unit, weight, codes[n, part], reach)
            scales[n, b] = scale
            if not found:
                row, first = (n, b) if off == 0 else (row, first)
                off += 1
                if off > patience:
                    return off, row, first
    return off, row, first
