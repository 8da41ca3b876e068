"""Compiled kernels: a chunk of rows in, its codes, scales and zero points out.

They share one file because the cache of compiled code is renewed when the file of a kernel changes, not the files of
what it calls.

Every kernel takes ``(rows, importance, block, top, symmetric, stored, codes, scales, zeros)``:
    rows: [R, K] float32.
    importance: [K] float32 weights of the squared error.
    block: weights that share a scale, 1..K; a last block may be shorter.
    top: the largest code, 2^bits - 1.
    symmetric: whether every zero point is 2^(bits-1).
    stored: significant bits, exponent of the least bit and largest value of the scales' dtype.
    codes, scales, zeros: [R, K] uint8, [R, B] float32, [R, B] uint8; written.
and returns how it ended: DONE, NOT_FINITE or SCALE_OVERFLOW.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt

Function = TypeVar("Function", bound=Callable[..., Any])
Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]
Stored = tuple[int, int, float]

DONE, NOT_FINITE, SCALE_OVERFLOW = 0, 1, 2

REORDER = {"reassoc", "contract", "nsz"}
"""Lets sums become vector sums, and leaves NaN and infinity as they are."""

LANES = 16
"""Grids that are tried at a time, side by side in vector registers."""

POLISH = 6
ENOUGH = np.float32(0.999)
LLOYD = 0
REACH = 1
TINY = np.float32(1e-30)
SAME_LEVEL = np.float32(1e-6)
K_QUANT, MSE_SEARCH = 0, 1

F0, F1, HALF = np.float32(0), np.float32(1), np.float32(0.5)


def compiled(fastmath: set[str] | bool = False) -> Callable[[Function], Function]:
    """Returns a decorator: compile on the first call, keep on disk, run without the GIL."""
    return cast("Callable[[Function], Function]", numba.njit(nogil=True, cache=True, fastmath=fastmath, error_model="numpy"))


@compiled(REORDER)
def all_finite(block: Floats) -> bool:
    """Tells whether no value is NaN or infinite."""
    probe = F0
    for value in block:
        probe += value * F0  # 0 for every finite value, NaN for any other
    return probe == F0


@compiled(REORDER)
def value_range(block: Floats) -> tuple[np.float32, np.float32]:
    """Returns the least and the greatest of a block of finite values."""
    low, high = block[0], block[0]
    for value in block:
        low = value if value < low else low
        high = value if value > high else high
    return low, high


@compiled()
def to_stored(scale: float, digits: int, least: int) -> np.float32:
    """Rounds to ``digits`` significant bits with none below 2^least, ties to even; the caller looks for overflow."""
    unit = math.ldexp(1.0, max(math.frexp(scale)[1] - digits, least))
    return np.float32(np.rint(scale / unit) * unit)


@compiled()
def encode_half_away(block: Floats, inverse: np.float32, zero: np.float32, top: np.float32, codes: Codes) -> None:
    """Writes the codes of a block, rounding halves away from zero as C's ``roundf``."""
    for i in range(block.size):
        level = min(max(block[i] * inverse + zero, F0), top)
        floor = np.floor(level)
        codes[i] = np.uint8(floor + (F1 if level - floor >= HALF else F0))


@compiled()
def rtn(
    rows: Floats,
    importance: Floats,
    block: int,
    top: int,
    symmetric: bool,
    stored: Stored,
    codes: Codes,
    scales: Floats,
    zeros: Codes,
) -> int:
    """Round to nearest in the range of each block; the float32 operations and their order are ORT's."""
    full, half = np.float32(top), np.float32((top + 1) // 2)
    for r in range(rows.shape[0]):
        for b in range(scales.shape[1]):
            values = rows[r, b * block : (b + 1) * block]
            if not all_finite(values):
                return NOT_FINITE
            low, high = value_range(values)
            if symmetric:
                wide = high if abs(high) > abs(low) else low
                scale, zero = -wide / half, half
            else:
                low, high = min(low, F0), max(high, F0)
                scale, zero = (high - low) / full, F0
                if scale != F0:
                    exact = min(max(F0 - low / scale, F0), full)
                    floor = np.floor(exact)
                    zero = floor + (F1 if exact - floor >= HALF else F0)
            scale = to_stored(scale, stored[0], stored[1])
            if not abs(scale) <= stored[2]:
                return SCALE_OVERFLOW
            inverse = F1 / scale if scale != F0 else F0
            encode_half_away(values, inverse, zero, full, codes[r, b * block : (b + 1) * block])
            scales[r, b] = scale
            zeros[r, b] = np.uint8(zero)
    return DONE


@compiled(REORDER)
def normalise(values: Floats, block: Floats) -> int:
    """Writes ``values * 2^-e``, the largest magnitude in [0.5, 1), so that no square over- or underflows; gives e."""
    low, high = value_range(values)
    low, high = min(low, F0), max(high, F0)
    exponent = math.frexp(max(-low, high))[1]
    probe = F0
    factor = math.ldexp(1.0, -exponent)
    for i in range(values.size):
        block[i] = np.float32(values[i] * factor)
        probe += values[i] * F0
    if probe != F0:
        return 99999, low, high
    return exponent, np.float32(low * factor), np.float32(high * factor)


@compiled(REORDER)
def weigh(block: Floats, importance: Floats, weights: Floats) -> None:
    """Writes k-quant's weights of the squared error: importance times (root mean square + magnitude)."""
    square = F0
    for value in block:
        square += value * value
    rms = np.float32(math.sqrt(square / block.size))
    for i in range(block.size):
        weights[i] = importance[i] * (rms + abs(block[i]))


@compiled(REORDER)
def residual(
    block: Floats, weights: Floats, scale: np.float32, low: np.float32, high: np.float32
) -> tuple[np.float32, np.float32, np.float32]:
    """Rounds a block on the grid ``scale * (low..high)``.

    Returns:
        The weighted sums of r*r, r*t and t*t, where t is the level and r the rest, both in units of the scale.
    """
    inverse = F1 / scale
    rr, rt, tt = F0, F0, F0
    for i in range(block.size):
        exact = block[i] * inverse
        t = np.rint(min(max(exact, low), high))
        r = exact - t
        rr += weights[i] * r * r
        rt += weights[i] * t * r
        tt += weights[i] * t * t
    return rr, rt, tt


@compiled(REORDER)
def residuals(block: Floats, weights: Floats, low: np.float32, high: np.float32, lanes: Floats) -> None:
    """As ``residual`` for LANES grids at a time: inverse scales in, the three sums of each out.

    All in one array: several could overlap for all the compiler knows, and would be checked for it at every weight.
    """
    for j in range(LANES, 4 * LANES):
        lanes[j] = F0
    for i in range(block.size):
        value, weight = block[i], weights[i]
        for j in range(LANES):
            exact = value * lanes[j]
            t = np.rint(min(max(exact, low), high))
            r = exact - t
            lanes[LANES + j] += weight * r * r
            lanes[2 * LANES + j] += weight * t * r
            lanes[3 * LANES + j] += weight * t * t


@compiled(REORDER)
def affine_residuals(block: Floats, weights: Floats, low: np.float32, top: np.float32, lanes: Floats) -> None:
    """As ``residuals`` for grids that start at ``low``: sums of r*r, r*t, t*t, r and t."""
    for j in range(LANES, 6 * LANES):
        lanes[j] = F0
    for i in range(block.size):
        value, weight = block[i] - low, weights[i]
        for j in range(LANES):
            exact = value * lanes[j]
            t = np.rint(min(exact, top))
            r = exact - t
            lanes[LANES + j] += weight * r * r
            lanes[2 * LANES + j] += weight * t * r
            lanes[3 * LANES + j] += weight * t * t
            lanes[4 * LANES + j] += weight * r
            lanes[5 * LANES + j] += weight * t


@compiled(REORDER)
def best_scale(
    block: Floats, weights: Floats, scale: np.float32, zero: int, top: int, grid: Floats, lanes: Floats
) -> np.float32:
    """Returns the least-squares scale of the best of the grids ``scale / grid[j]`` with this zero point."""
    inverse = F1 / scale
    for j in range(LANES):
        lanes[j] = inverse * grid[j]
    residuals(block, weights, np.float32(-zero), np.float32(top - zero), lanes)
    for j in range(LANES):
        rr, rt, tt = lanes[LANES + j], lanes[2 * LANES + j], max(lanes[3 * LANES + j], TINY)
        # With the levels as they are, the error is least at this scale, and this is its square.
        lanes[LANES + j] = (rr - rt * rt / tt) / (lanes[j] * lanes[j])
        lanes[2 * LANES + j] = (F1 + rt / tt) / lanes[j]
    error, best = lanes[LANES], lanes[2 * LANES]
    for j in range(1, LANES):
        if lanes[LANES + j] < error:
            error, best = lanes[LANES + j], lanes[2 * LANES + j]
    return best


@compiled(REORDER)
def polish(
    block: Floats, weights: Floats, scale: np.float32, zero: int, top: int, digits: int, least: int, rounds: int
) -> tuple[np.float32, np.float32]:
    """Refits a scale to its own codes as it will be stored.

    Returns:
        The weighted squared error and the stored scale; infinite and 0 where it is stored as 0.
    """
    error, best = np.float32(np.inf), F0
    for _ in range(rounds):
        scale = to_stored(scale, digits, least)
        if scale == F0:
            break
        rr, rt, tt = residual(block, weights, scale, np.float32(-zero), np.float32(top - zero))
        this = scale * scale * rr
        enough = this > ENOUGH * error
        if this < error:
            error, best = this, scale
        if enough:
            break
        scale = scale * (F1 + rt / max(tt, TINY))
    return error, best


@compiled()
def plain_grid(low: np.float32, high: np.float32, top: int, symmetric: bool) -> tuple[np.float32, int]:
    """Returns round-to-nearest's scale and zero point for a range that spans 0.

    A symmetric grid is turned so that its longer side holds the larger magnitude: a zero point of half - 1 stands for
    half with a negative scale.
    """
    half = (top + 1) // 2
    if symmetric:
        return max(-low, high) / np.float32(half), half if -low >= high else half - 1
    scale = (high - low) / np.float32(top)
    return scale, int(np.rint(-low / scale))


@compiled()
def fit_k_quant(
    block: Floats, importance: Floats, weights: Floats, low, high, top: int, symmetric: bool, digits: int, least: int, grid: Floats, lanes: Floats
) -> tuple[np.float32, int]:
    """Returns the scale and zero point of the weighted least-squares fit."""
    scale, zero = plain_grid(low, high, top, symmetric)
    error, best = polish(block, importance, scale, zero, top, digits, least, 1)
    if symmetric:
        scale = best_scale(block, weights, scale, zero, top, grid, lanes)
        other = zero
    else:
        scale, start = best_line(block, weights, low, scale, top, grid, lanes)
        for _ in range(LLOYD):
            scale, start = refit_line(block, weights, scale, start, top)
        other = int(min(max(np.rint(-start / scale), 0), top))
    other_error, other_scale = polish(block, importance, scale, other, top, digits, least, POLISH)
    return (other_scale, other) if other_error < error else (best, zero)


@compiled(REORDER)
def refit_line(block: Floats, weights: Floats, scale, start, top):
    inverse = F1 / scale
    full = np.float32(top)
    rr, rt, tt, r1, t1, total = F0, F0, F0, F0, F0, F0
    for i in range(block.size):
        exact = (block[i] - start) * inverse
        t = np.rint(min(max(exact, F0), full))
        r = exact - t
        total += weights[i]
        rt += weights[i] * t * r
        tt += weights[i] * t * t
        r1 += weights[i] * r
        t1 += weights[i] * t
    spread = max(total * tt - t1 * t1, SAME_LEVEL * total * tt + TINY)
    slope = (total * rt - r1 * t1) / spread
    shift = (tt * r1 - t1 * rt) / spread
    return scale*(F1 + slope), start + shift*scale


@compiled(REORDER)
def best_line(
    block: Floats, weights: Floats, low: np.float32, scale: np.float32, top: int, grid: Floats, lanes: Floats
) -> tuple[np.float32, np.float32]:
    """Returns scale and offset of the best least-squares line through the levels of LANES grids."""
    for j in range(LANES):
        lanes[j] = grid[j] / scale
    affine_residuals(block, weights, low, np.float32(top), lanes)
    total = F0
    for weight in weights:
        total += weight
    for j in range(LANES):
        rr, rt, tt = lanes[LANES + j], lanes[2 * LANES + j], lanes[3 * LANES + j]
        r, t = lanes[4 * LANES + j], lanes[5 * LANES + j]
        # One level for every weight defines no line: the slope is then 0.
        spread = max(total * tt - t * t, SAME_LEVEL * total * tt + TINY)
        slope = (total * rt - r * t) / spread
        shift = (tt * r - t * rt) / spread
        lanes[LANES + j] = (rr - slope * rt - shift * r) / (lanes[j] * lanes[j])
        lanes[2 * LANES + j] = (F1 + slope) / lanes[j]
        lanes[3 * LANES + j] = low + shift / lanes[j]
    error, best = np.float32(np.inf), 0
    for j in range(LANES):
        if lanes[LANES + j] < error:
            error, best = lanes[LANES + j], j
    return lanes[2 * LANES + best], lanes[3 * LANES + best]


@compiled()
def fit_mse(
    block: Floats, weights: Floats, low, high, top: int, symmetric: bool, digits: int, least: int, coarse: Floats, fine: Floats, lanes: Floats
) -> tuple[np.float32, int]:
    """Returns the scale and zero point of the least weighted squared error found."""
    plain, zero = plain_grid(low, high, top, symmetric)
    error, best = polish(block, weights, plain, zero, top, digits, least, POLISH)
    first, last = 0, top
    starts = 1
    if symmetric:
        starts = 2
    for start in range(starts):
        middle = zero
        if symmetric:
            middle = (top + 1) // 2 - start
            first = last = middle
        widest = max(-low / np.float32(max(middle, 1)), high / np.float32(max(top - middle, 1)))
        around = best_scale(block, weights, widest, middle, top, coarse, lanes)
        nearest = middle
        for way in (1, -1):
            this = middle if way > 0 else middle - 1
            while first <= this <= last and way * (this - nearest) <= REACH:
                scale = best_scale(block, weights, around, this, top, fine, lanes)
                this_error, scale = polish(block, weights, scale, this, top, digits, least, POLISH)
                if this_error < error:
                    error, best, zero, nearest = this_error, scale, this, this
                this += way
    return best, zero


@compiled(REORDER)
def encode(block: Floats, scale: np.float32, zero: int, top: int, codes: Codes) -> None:
    """Writes the nearest codes of a block."""
    inverse = F1 / scale if scale != F0 else F0
    low, high = np.float32(-zero), np.float32(top - zero)
    for i in range(block.size):
        codes[i] = np.uint8(np.rint(min(max(block[i] * inverse, low), high)) - low)


@compiled()
def geometric(first: float, last: float) -> Floats:
    grid = np.empty(LANES, np.float32)
    for j in range(LANES):
        grid[j] = first * (last / first) ** (j / (LANES - 1))
    return grid


@compiled()
def fitted(
    method: int,
    rows: Floats,
    importance: Floats,
    block: int,
    top: int,
    symmetric: bool,
    stored: Stored,
    codes: Codes,
    scales: Floats,
    zeros: Codes,
) -> int:
    """Fits the grid of each block by K_QUANT or MSE_SEARCH."""
    digits, least, largest = stored
    half = (top + 1) // 2
    scratch, weights = np.empty(min(block, rows.shape[1]), np.float32), np.empty(min(block, rows.shape[1]), np.float32)
    lanes = np.empty(6 * LANES, np.float32)
    steps = F1 + np.float32(0.125) * (np.arange(LANES).astype(np.float32) - np.float32(LANES // 2)) / np.float32(half if symmetric else top)
    coarse = geometric(0.94, 6.7)
    fine = geometric(0.74, 1.35) if top < 255 else geometric(0.94, 1.06)
    for r in range(rows.shape[0]):
        for b in range(scales.shape[1]):
            values = rows[r, b * block : (b + 1) * block]
            x, w = scratch[: values.size], weights[: values.size]
            here = importance[b * block : (b + 1) * block]
            exponent, low, high = normalise(values, x)
            scale, zero = F0, half
            if low < high:
                if method == K_QUANT:
                    weigh(x, here, w)
                    scale, zero = fit_k_quant(x, here, w, low, high, top, symmetric, digits, least - exponent, steps, lanes)
                else:
                    scale, zero = fit_mse(x, here, low, high, top, symmetric, digits, least - exponent, coarse, fine, lanes)
            if symmetric and zero != half:
                scale, zero = -scale, half
            encode(x, scale, zero, top, codes[r, b * block : (b + 1) * block])
            scales[r, b] = math.ldexp(scale, exponent)
            if not abs(scales[r, b]) <= largest:
                return SCALE_OVERFLOW
            zeros[r, b] = zero
    return DONE
