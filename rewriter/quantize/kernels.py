"""Compiled kernels: a chunk of rows in, its codes, scales and zero points out.

They share one file because the cache of compiled code is renewed when the file of a kernel changes, not when the
files of what it calls do.

A block is fitted in a scratch copy, divided by a power of two so that no square over- or underflows. Its grid is
``scale * (code - zero)``; the scale is positive. A symmetric grid with a negative scale is written as its mirror image,
with zero point half - 1, until the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt

Function = TypeVar("Function", bound=Callable[..., Any])
Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]
Stored = tuple[int, int]
"""Of the dtype of stored scales: significant bits, and exponent of the least bit, both seen from the scratch copy."""

RTN, K_QUANT, MSE_SEARCH = 0, 1, 2
DONE, NOT_FINITE, SCALE_OVERFLOW = 0, 1, 2

LANES = 16
"""Scales that are tried at a time, side by side in vector registers."""

ROUNDS, ENOUGH = 8, np.float32(0.998)
"""A scale is refitted until its error falls by less than 0.2%, at most so many times."""

POSITIVE = 7
"""The largest code of 3 bits, of which no runtime takes negative scales."""

SAME_LEVEL = np.float32(1e-6)
"""Relative variance of the levels below which they define no line."""

F0, F1, HALF, TINY = np.float32(0), np.float32(1), np.float32(0.5), np.float32(1e-30)
LARGEST = np.float32(3.4028234663852886e38)
MAGNITUDE = np.int32(0x7FFFFFFF)

REORDER = {"reassoc", "contract", "nsz"}
"""Lets sums become vector sums, and leaves NaN and infinity as they are."""


def compiled(fastmath: set[str] | bool = False) -> Callable[[Function], Function]:
    """Returns a decorator: compile on the first call, keep on disk, run without the GIL.

    Four things are needed for vector code in blocks of 32: no test of every divisor, as Python's division makes it; no
    calls, which cost as much as a short loop; loops over ``range``, not over an array's values; selections instead of
    branches.
    """

    def decorate(function: Function) -> Function:
        def jit(cache: bool) -> Function:
            made = numba.njit(nogil=True, cache=cache, fastmath=fastmath, error_model="numpy", forceinline=True)
            return cast("Function", made(function))

        try:
            return jit(cache=True)
        except RuntimeError:  # nowhere to keep it: an installation that is read-only, for a user without a home
            return jit(cache=False)

    return decorate


@compiled()
def all_finite(row: Floats) -> bool:
    """Tells whether no value is NaN or infinite."""
    finite = True
    for i in range(row.size):
        finite &= abs(row[i]) <= LARGEST
    return finite


@compiled()
def ordered(bits: np.int32) -> np.int32:
    """Maps the bits of a float32 to an integer that orders as the float does; and back."""
    return np.int32(bits ^ (np.int32(bits >> np.int32(31)) & MAGNITUDE))


@compiled()
def value_range(bits: npt.NDArray[np.int32]) -> tuple[np.float32, np.float32]:
    """Returns the range of finite float32 values, given as their bits, widened to hold 0."""
    # Compilers make vectors of a minimum of integers; of floats, which may be NaN, they do not: seven times slower.
    low, high = np.int32(0), np.int32(0)
    for i in range(bits.size):
        value = ordered(bits[i])
        low = min(low, value)
        high = max(high, value)
    return np.int32(ordered(low)).view(np.float32), np.int32(ordered(high)).view(np.float32)


@compiled()
def exponent_of(value: np.float32) -> int:
    """Returns e with ``|value| * 2^-e`` in [0.5, 1), as ``frexp``, which cannot be inlined."""
    return int((np.float64(value).view(np.int64) >> 52) & 2047) - 1022


@compiled()
def power_of_two(exponent: int) -> np.float64:
    """Returns 2^exponent for exponents in -1022..1023."""
    return np.int64((exponent + 1023) << 52).view(np.float64)


@compiled()
def to_stored(scale: np.float32, stored: Stored) -> np.float32:
    """Rounds to the dtype of stored scales, ties to even; the caller looks for overflow."""
    digits, least = stored
    unit = power_of_two(max(exponent_of(scale) - digits, least))
    return np.float32(np.rint(scale / unit) * unit)


@compiled(REORDER)
def normalise(values: Floats, bits: npt.NDArray[np.int32], block: Floats) -> tuple[int, np.float32, np.float32]:
    """Writes ``values * 2^-e``, the largest magnitude in [0.5, 1); ``bits`` are those of the values.

    Returns:
        e, and the range of the block, widened to hold 0.
    """
    low, high = value_range(bits)
    exponent = exponent_of(max(-low, high))
    factor = power_of_two(-exponent)
    for i in range(values.size):
        block[i] = np.float32(values[i] * factor)
    return exponent, np.float32(low * factor), np.float32(high * factor)


@compiled()
def round_half_away(value: np.float32) -> np.float32:
    """Rounds a non-negative number as C's ``roundf``, which ORT uses."""
    floor = np.floor(value)
    return np.float32(floor + (F1 if value - floor >= HALF else F0))


@compiled()
def encode(block: Floats, scale: np.float32, zero: int, top: int, codes: Codes) -> None:
    """Writes the nearest codes of a block; the float32 operations and their order are ORT's."""
    inverse = F1 / scale if scale != F0 else F0
    offset, full = np.float32(zero), np.float32(top)
    for i in range(block.size):
        codes[i] = np.uint8(round_half_away(min(max(block[i] * inverse + offset, F0), full)))


@compiled()
def plain_grid(low: np.float32, high: np.float32, top: int, symmetric: bool) -> tuple[np.float32, int]:
    """Returns the scale and zero point that round-to-nearest reads off the range of a block that is not all 0."""
    half = (top + 1) // 2
    if symmetric and top == POSITIVE:
        return max(-low / np.float32(half), high / np.float32(half - 1)), half
    if symmetric:
        return max(-low, high) / np.float32(half), half if -low >= high else half - 1
    scale = (high - low) / np.float32(top)
    return scale, int(round_half_away(min(-low / scale, np.float32(top))))


@compiled(REORDER)
def residual(
    block: Floats, weights: Floats, scale: np.float32, zero: int, top: int
) -> tuple[np.float32, np.float32, np.float32]:
    """Rounds a block to a grid.

    Returns:
        The weighted sums of r*r, t*r and t*t, where t is the level (code - zero) and r the rest, in units of the scale.
    """
    inverse = F1 / scale
    low, high = np.float32(-zero), np.float32(top - zero)
    rr, tr, tt = F0, F0, F0
    for i in range(block.size):
        exact = block[i] * inverse
        t = np.rint(min(max(exact, low), high))
        r = exact - t
        rr += weights[i] * r * r
        tr += weights[i] * t * r
        tt += weights[i] * t * t
    return rr, tr, tt


@compiled()
def refit(
    block: Floats, weights: Floats, scale: np.float32, zero: int, top: int, stored: Stored, rounds: int
) -> tuple[np.float32, np.float32]:
    """Alternates between the codes of a scale and the least-squares scale of the codes, rounded as it will be stored.

    Returns:
        The least weighted squared error met, and its scale; infinity and 0 if the scale is stored as 0.
    """
    error, best = np.float32(np.inf), F0
    for _ in range(rounds):
        scale = to_stored(scale, stored)
        if scale == F0:
            break
        rr, tr, tt = residual(block, weights, scale, zero, top)
        this = scale * scale * rr
        last = this > ENOUGH * error
        if this < error:
            error, best = this, scale
        if last:
            break
        scale = scale * (F1 + tr / max(tt, TINY))
    return error, best


@compiled(REORDER)
def residuals(block: Floats, weights: Floats, zero: int, top: int, lanes: Floats) -> None:
    """As ``residual`` for LANES scales at a time: their inverses in, the three sums of each out.

    All in one array: several might overlap for all the compiler knows, and would be checked for it at every weight.
    """
    low, high = np.float32(-zero), np.float32(top - zero)
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
def line_residuals(block: Floats, weights: Floats, low: np.float32, top: int, lanes: Floats) -> None:
    """As ``residuals`` for grids that start at ``low``, with two more sums: of r and of t."""
    full = np.float32(top)
    for j in range(LANES, 6 * LANES):
        lanes[j] = F0
    for i in range(block.size):
        value, weight = block[i] - low, weights[i]
        for j in range(LANES):
            exact = value * lanes[j]
            t = np.rint(min(exact, full))
            r = exact - t
            lanes[LANES + j] += weight * r * r
            lanes[2 * LANES + j] += weight * t * r
            lanes[3 * LANES + j] += weight * t * t
            lanes[4 * LANES + j] += weight * r
            lanes[5 * LANES + j] += weight * t


@compiled()
def least_lane(lanes: Floats) -> int:
    """Returns the lane of the least error; errors are the second LANES numbers."""
    # Selections, not branches: which lane is best cannot be predicted.
    least, best = lanes[LANES], 0
    for j in range(1, LANES):
        error = lanes[LANES + j]
        best = j if error < least else best
        least = error if error < least else least
    return best


@compiled(REORDER)
def best_scale(
    block: Floats, weights: Floats, scale: np.float32, zero: int, top: int, steps: Floats, lanes: Floats
) -> np.float32:
    """Returns the least-squares scale of the codes that the best of ``scale / steps`` gives with this zero point."""
    inverse = F1 / scale
    for j in range(LANES):
        lanes[j] = inverse * steps[j]
    residuals(block, weights, zero, top, lanes)
    for j in range(LANES):
        rr, tr, tt = lanes[LANES + j], lanes[2 * LANES + j], max(lanes[3 * LANES + j], TINY)
        lanes[LANES + j] = (rr * tt - tr * tr) / (tt * lanes[j] * lanes[j])
    best = least_lane(lanes)
    return np.float32((F1 + lanes[2 * LANES + best] / max(lanes[3 * LANES + best], TINY)) / lanes[best])


@compiled(REORDER)
def best_line(
    block: Floats, weights: Floats, scale: np.float32, low: np.float32, top: int, steps: Floats, lanes: Floats
) -> tuple[np.float32, np.float32]:
    """Returns slope and start of the least-squares line through the codes of the best of ``scale / steps``."""
    inverse = F1 / scale
    for j in range(LANES):
        lanes[j] = inverse * steps[j]
    line_residuals(block, weights, low, top, lanes)
    total = F0
    for i in range(weights.size):
        total += weights[i]
    for j in range(LANES):
        rr, tr, tt = lanes[LANES + j], lanes[2 * LANES + j], lanes[3 * LANES + j]
        r, t = lanes[4 * LANES + j], lanes[5 * LANES + j]
        spread = max(total * tt - t * t, SAME_LEVEL * total * tt + TINY)
        slope = (total * tr - r * t) / spread
        start = (tt * r - t * tr) / spread
        lanes[LANES + j] = (rr - slope * tr - start * r) / (lanes[j] * lanes[j])
        lanes[2 * LANES + j] = slope
        lanes[3 * LANES + j] = start
    best = least_lane(lanes)
    return (F1 + lanes[2 * LANES + best]) / lanes[best], low + lanes[3 * LANES + best] / lanes[best]


@compiled(REORDER)
def k_quant_weights(block: Floats, importance: Floats, weights: Floats) -> None:
    """Writes importance * (root mean square of the block + magnitude)."""
    square = F0
    for i in range(block.size):
        square += block[i] * block[i]
    rms = np.sqrt(square / np.float32(block.size))
    for i in range(block.size):
        weights[i] = importance[i] * (rms + abs(block[i]))


@compiled()
def fit_k_quant(
    block: Floats,
    importance: Floats,
    weights: Floats,
    low: np.float32,
    high: np.float32,
    top: int,
    symmetric: bool,
    stored: Stored,
    steps: Floats,
    lanes: Floats,
) -> tuple[np.float32, int]:
    """See ``rewriter.quantize.k_quant``; never worse than round-to-nearest."""
    plain, plain_zero = plain_grid(low, high, top, symmetric)
    k_quant_weights(block, importance, weights)
    zero = plain_zero
    if symmetric:
        scale = best_scale(block, weights, plain, zero, top, steps, lanes)
    else:
        scale, start = best_line(block, weights, plain, low, top, steps, lanes)
        if scale > F0:
            zero = int(np.rint(min(max(-start / scale, F0), np.float32(top))))
    error, best = refit(block, importance, scale, zero, top, stored, ROUNDS)
    rounds = 1 if zero == plain_zero else ROUNDS
    plain_error, plain = refit(block, importance, plain, plain_zero, top, stored, rounds)
    return (best, zero) if error < plain_error else (plain, plain_zero)


@compiled()
def fit_mse(
    block: Floats,
    importance: Floats,
    low: np.float32,
    high: np.float32,
    top: int,
    symmetric: bool,
    stored: Stored,
    coarse: Floats,
    fine: Floats,
    lanes: Floats,
) -> tuple[np.float32, int]:
    """See ``rewriter.quantize.mse_search``; never worse than round-to-nearest."""
    scale, zero = plain_grid(low, high, top, symmetric)
    error, best = refit(block, importance, scale, zero, top, stored, ROUNDS)
    first, last, start = 0, top, zero
    for mirror in range(2 if symmetric and top != POSITIVE else 1):
        if symmetric:
            first = last = start = (top + 1) // 2 - mirror
        widest = max(-low / np.float32(max(start, 1)), high / np.float32(max(top - start, 1)))
        around = best_scale(block, importance, widest, start, top, coarse, lanes)
        nearest = start
        for way in (1, -1):
            this = start if way > 0 else start - 1
            while first <= this <= last and abs(this - nearest) <= 1:
                scale = best_scale(block, importance, around, this, top, fine, lanes)
                this_error, scale = refit(block, importance, scale, this, top, stored, ROUNDS)
                if this_error < error:
                    error, best, zero, nearest = this_error, scale, this, this
                this += way
    return best, zero


@compiled()
def geometric(first: float, last: float) -> Floats:
    """Returns LANES numbers in even ratios."""
    return np.exp(np.linspace(np.log(first), np.log(last), LANES)).astype(np.float32)


@compiled()
def quantize(
    rows: Floats,
    importance: Floats,
    method: int,
    block: int,
    top: int,
    symmetric: bool,
    dtype: tuple[int, int, float],
    codes: Codes,
    scales: Floats,
    zeros: Codes,
) -> int:
    """Quantizes a chunk of rows.

    Args:
        rows: [R, K].
        importance: [K] weights of the squared error.
        method: RTN, K_QUANT or MSE_SEARCH.
        block: weights that share a scale; a last block may be shorter.
        top: the largest code, 2^bits - 1.
        symmetric: whether every zero point is 2^(bits-1).
        dtype: of stored scales: significant bits, exponent of the least bit, largest number.
        codes: [R, K], written.
        scales: [R, B], written.
        zeros: [R, B], written.

    Returns:
        DONE, NOT_FINITE or SCALE_OVERFLOW.
    """
    half = (top + 1) // 2
    digits, least, largest = dtype
    scratch = np.empty(min(block, rows.shape[1]), np.float32)
    weights = np.empty_like(scratch)
    lanes = np.empty(6 * LANES, np.float32)
    # In eighths of a level around the plain grid.
    steps = (F1 + (np.arange(LANES) - LANES // 2) / (8.0 * (half if symmetric else top))).astype(np.float32)
    # From a little wider than the block, where another phase of the grid may fit, to a seventh, for outliers.
    coarse = geometric(0.94, 6.7)
    # 8 bits fit best close to the full range, and need the finer steps.
    fine = geometric(0.94, 1.06) if top == 255 else geometric(0.74, 1.35)
    bits = rows.view(np.int32)
    for n in range(rows.shape[0]):
        if not all_finite(rows[n]):
            return NOT_FINITE
        for b in range(scales.shape[1]):
            part = slice(b * block, (b + 1) * block)
            values, given = rows[n, part], importance[part]
            x, w = scratch[: values.size], weights[: values.size]
            exponent, low, high = normalise(values, bits[n, part], x)
            stored = (digits, least - exponent)
            # ORT's symmetric scale of an all-zero block is -0.
            scale, zero = (-F0, half) if symmetric else (F0, 0)
            if low < high:
                if method == RTN:
                    scale, zero = plain_grid(low, high, top, symmetric)
                    scale = to_stored(scale, stored)
                elif method == K_QUANT:
                    scale, zero = fit_k_quant(x, given, w, low, high, top, symmetric, stored, steps, lanes)
                else:
                    scale, zero = fit_mse(x, given, low, high, top, symmetric, stored, coarse, fine, lanes)
                if symmetric and zero != half:
                    scale, zero = -scale, half
            encode(x, scale, zero, top, codes[n, part])
            scales[n, b] = np.float32(scale * power_of_two(exponent))
            if not abs(scales[n, b]) <= largest:
                return SCALE_OVERFLOW
            zeros[n, b] = zero
    return DONE
