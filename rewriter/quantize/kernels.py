"""Compiled kernels: a chunk of rows in, its codes, scales and zero points out.

They share one file because the cache of compiled code is renewed when the file of a kernel changes, not when the
files of what it calls do; only the type of lanes stands apart.

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

from rewriter.quantize.lanes import (
    LANES,
    Lanes,
    Tile,
    any_less,
    exponents_of,
    fill,
    fma,
    if_less,
    load,
    maximum,
    minimum,
    powers_of_two,
    rint,
    sqrt,
    store,
)

Function = TypeVar("Function", bound=Callable[..., Any])
Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]
Stored = tuple[int, int]
"""Of the dtype of stored scales: significant bits, and exponent of the least bit, both seen from the scratch copy."""

RTN, K_QUANT, MSE_SEARCH = 0, 1, 2
DONE, NOT_FINITE, SCALE_OVERFLOW = 0, 1, 2

ROUNDS, ENOUGH = 8, np.float32(0.998)
"""A scale is refitted until its error falls by less than 0.2%, at most so many times."""

POSITIVE, EIGHT_BITS = 7, 255
"""The largest codes of 3 bits, of which no runtime takes negative scales, and of 8 bits."""

LOW, HIGH, LEAST, SCALE, ZERO, SIZE, FIGURES = range(7)
"""Rows of the figures that are kept of every block: its range, the exponent of the least bit of a stored scale, its
grid, and how many weights it has."""

SHIFT, HIGHEST = np.float32(23), np.float32(100)
"""Bits after the leading one of a float32, and an exponent that no scale of a scratch copy comes near."""

SAME_LEVEL = np.float32(1e-6)
"""Relative variance of the levels below which they define no line."""

F0, F1, HALF, TINY = np.float32(0), np.float32(1), np.float32(0.5), np.float32(1e-30)
INFINITY = np.float32(np.inf)
LARGEST = np.float32(3.4028234663852886e38)
MAGNITUDE = np.int32(0x7FFFFFFF)

REORDER = {"reassoc", "contract", "nsz"}
"""Lets sums become vector sums, and leaves NaN and infinity as they are."""


def compiled(fastmath: set[str] | bool = False, *, inline: bool = True) -> Callable[[Function], Function]:
    """Returns a decorator: compile on the first call, keep on disk, run without the GIL.

    Four things are needed for vector code in blocks of 32: no test of every divisor, as Python's division makes it; no
    calls, which cost as much as a short loop; loops over ``range``, not over an array's values; selections instead of
    branches.
    """

    def decorate(function: Function) -> Function:
        def jit(cache: bool) -> Function:
            made = numba.njit(nogil=True, cache=cache, fastmath=fastmath, error_model="numpy", forceinline=inline)
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


@compiled()
def residuals(tile: Tile, weights: Tile | None, inverse: Lanes, zero: Lanes, top: Lanes) -> tuple[Lanes, Lanes, Lanes]:
    """Rounds blocks to a grid each.

    Args:
        tile: the blocks.
        weights: of the squares, a tile; None is 1 for each.
        inverse: 1 / scale.
        zero: zero point.
        top: the largest code.

    Returns:
        The weighted sums of r*r, t*r and t*t, where t is the level (code - zero) and r the rest, in units of the scale.
    """
    low, high = fill(F0) - zero, top - zero
    rr, tr, tt = fill(F0), fill(F0), fill(F0)
    for i in range(tile.shape[0]):
        exact = load(tile, i) * inverse
        t = rint(minimum(maximum(exact, low), high))
        r = exact - t
        if weights is None:
            rr, tr, tt = fma(r, r, rr), fma(t, r, tr), fma(t, t, tt)
        else:
            weight = load(weights, i)
            wt = weight * t
            rr, tr, tt = fma(weight * r, r, rr), fma(wt, r, tr), fma(wt, t, tt)
    return rr, tr, tt


@compiled()
def line_residuals(
    tile: Tile, weights: Tile, inverse: Lanes, low: Lanes, top: Lanes
) -> tuple[Lanes, Lanes, Lanes, Lanes, Lanes]:
    """As ``residuals`` for grids that start at ``low``, with two more sums: of r and of t."""
    rr, tr, tt, sum_r, sum_t = fill(F0), fill(F0), fill(F0), fill(F0), fill(F0)
    for i in range(tile.shape[0]):
        exact = (load(tile, i) - low) * inverse
        t = rint(minimum(exact, top))
        r = exact - t
        weight = load(weights, i)
        wr, wt = weight * r, weight * t
        rr, tr, tt = fma(wr, r, rr), fma(wt, r, tr), fma(wt, t, tt)
        sum_r, sum_t = sum_r + wr, sum_t + wt
    return rr, tr, tt, sum_r, sum_t


@compiled()
def as_stored(scale: Lanes, digits: np.float32, least: Lanes) -> Lanes:
    """As ``to_stored``, for blocks that each have a least bit of their own."""
    # Added to 2^23 units, a float32 has no room for less than a unit.
    unit = maximum(exponents_of(scale) - fill(digits), least)
    large = powers_of_two(minimum(unit + fill(SHIFT), fill(HIGHEST)))
    return if_less(scale, large, (scale + large) - large, scale)


@compiled(inline=False)
def refit(
    tile: Tile,
    weights: Tile | None,
    scale: Lanes,
    zero: Lanes,
    top: Lanes,
    digits: np.float32,
    least: Lanes,
    rounds: int,
) -> tuple[Lanes, Lanes]:
    """Alternates between the codes of a scale and the least-squares scale of the codes, rounded as it will be stored.

    Returns:
        The least weighted squared error met, and its scale; infinity and 0 if the scale is stored as 0.
    """
    error, best, going = fill(INFINITY), fill(F0), fill(F1)
    for _ in range(rounds):
        scale = as_stored(scale, digits, least)
        rr, tr, tt = residuals(tile, weights, fill(F1) / maximum(scale, fill(TINY)), zero, top)
        this = if_less(fill(F0), scale, scale * scale * rr, fill(INFINITY))
        going = if_less(this, fill(ENOUGH) * error, going, fill(F0))
        best = if_less(this, error, scale, best)
        error = minimum(this, error)
        if not any_less(fill(F0), going):
            break
        # A block that has settled stays as it is, however many rounds those beside it take.
        scale = if_less(fill(F0), going, scale * (fill(F1) + tr / maximum(tt, fill(TINY))), best)
    return error, best


@compiled(inline=False)
def best_scale(
    tile: Tile, weights: Tile | None, scale: Lanes, zero: Lanes, top: Lanes, steps: Floats
) -> tuple[Lanes, Lanes]:
    """Returns the least-squares scale of the codes that the best of ``scale / steps`` gives, after its error."""
    inverse = fill(F1) / scale
    error, best = fill(INFINITY), scale
    for n in range(steps.size):
        tried = inverse * fill(steps[n])
        rr, tr, tt = residuals(tile, weights, tried, zero, top)
        unit = fill(F1) / tried
        change = tr / maximum(tt, fill(TINY))
        this = (rr - change * tr) * (unit * unit)
        best = if_less(this, error, fma(unit, change, unit), best)
        error = minimum(this, error)
    return error, best


@compiled(inline=False)
def best_line(tile: Tile, weights: Tile, scale: Lanes, low: Lanes, top: Lanes, steps: Floats) -> tuple[Lanes, Lanes]:
    """Returns slope and start of the least-squares line through the codes of the best of ``scale / steps``."""
    inverse, total = fill(F1) / scale, fill(F0)
    for i in range(weights.shape[0]):
        total = total + load(weights, i)
    error, best, first = fill(INFINITY), scale, low
    for n in range(steps.size):
        tried = inverse * fill(steps[n])
        rr, tr, tt, r, t = line_residuals(tile, weights, tried, low, top)
        unit = fill(F1) / tried
        spread = fill(F1) / maximum(total * tt - t * t, fill(SAME_LEVEL) * total * tt + fill(TINY))
        slope, start = (total * tr - r * t) * spread, (tt * r - t * tr) * spread
        this = (rr - slope * tr - start * r) * (unit * unit)
        best = if_less(this, error, fma(unit, slope, unit), best)
        first = if_less(this, error, fma(unit, start, low), first)
        error = minimum(this, error)
    return best, first


@compiled()
def k_quant_weights(tile: Tile, importance: Tile | None, sizes: Lanes, weights: Tile) -> None:
    """Writes importance * (root mean square of the block + magnitude), and 0 beyond the block's ``sizes`` weights."""
    square = fill(F0)
    for i in range(tile.shape[0]):
        value = load(tile, i)
        square = fma(value, value, square)
    rms = sqrt(square / maximum(sizes, fill(F1)))
    for i in range(tile.shape[0]):
        value = load(tile, i)
        weight = rms + maximum(value, fill(F0) - value)
        # No weight lies beyond the end of a block.
        weight = if_less(fill(np.float32(i)), sizes, weight, fill(F0))
        store(weights, i, weight if importance is None else weight * load(importance, i))


@compiled(inline=False)
def fit_k_quant(
    tile: Tile,
    importance: Tile | None,
    weights: Tile,
    grids: Tile,
    symmetric: bool,
    limits: tuple[np.float32, np.float32],
    steps: Floats,
) -> None:
    """See ``rewriter.quantize.k_quant``; never worse than round-to-nearest."""
    low, least, sizes = load(grids, LOW), load(grids, LEAST), load(grids, SIZE)
    plain, plain_zero = load(grids, SCALE), load(grids, ZERO)
    top, digits = fill(limits[0]), limits[1]
    k_quant_weights(tile, importance, sizes, weights)
    zero = plain_zero
    if symmetric:
        _, scale = best_scale(tile, weights, plain, zero, top, steps)
    else:
        scale, start = best_line(tile, weights, plain, low, top, steps)
        fitted = rint(minimum(maximum((fill(F0) - start) / scale, fill(F0)), top))
        zero = if_less(fill(F0), scale, fitted, zero)
    error, best = refit(tile, importance, scale, zero, top, digits, least, ROUNDS)
    plain_error, plain = refit(tile, importance, plain, plain_zero, top, digits, least, ROUNDS)
    store(grids, SCALE, if_less(error, plain_error, best, plain))
    store(grids, ZERO, if_less(error, plain_error, zero, plain_zero))


@compiled(inline=False)
def fit_mse(
    tile: Tile,
    importance: Tile | None,
    grids: Tile,
    symmetric: bool,
    limits: tuple[np.float32, np.float32],
    coarse: Floats,
    fine: Floats,
) -> None:
    """See ``rewriter.quantize.mse_search``; never worse than round-to-nearest."""
    low, high, least = load(grids, LOW), load(grids, HIGH), load(grids, LEAST)
    plain, plain_zero = load(grids, SCALE), load(grids, ZERO)
    top, digits, one = fill(limits[0]), limits[1], fill(F1)
    mirrors = 2 if symmetric and limits[0] != POSITIVE else 1
    error, scale, zero = fill(INFINITY), plain, plain_zero
    for mirror in range(mirrors):
        start = fill((limits[0] + F1) * HALF - np.float32(mirror)) if symmetric else plain_zero
        widest = maximum((fill(F0) - low) / maximum(start, one), high / maximum(top - start, one))
        _, around = best_scale(tile, importance, widest, start, top, coarse)
        last = start
        for step in range(1 if symmetric else int(limits[0]) + 1):
            there = start + fill(F1 if step == 1 else -F1 if step == 2 else F0)
            if step > 2:
                if not (any_less(last, zero) or any_less(zero, last)):
                    break
                there, last = zero + (zero - last), zero
            there = minimum(maximum(there, fill(F0)), top)
            this_error, this = best_scale(tile, importance, around, there, top, fine)
            scale = if_less(this_error, error, this, scale)
            zero = if_less(this_error, error, there, zero)
            error = minimum(this_error, error)
    error, best = refit(tile, importance, scale, zero, top, digits, least, ROUNDS)
    plain_error, plain = refit(tile, importance, plain, plain_zero, top, digits, least, 1)
    store(grids, SCALE, if_less(error, plain_error, best, plain))
    store(grids, ZERO, if_less(error, plain_error, zero, plain_zero))


def steps(method: int, top: int, symmetric: bool) -> tuple[Floats, Floats]:
    """Returns by what a search divides the scale that it starts from, and then the best of these again."""

    def geometric(first: float, last: float, count: int) -> Floats:
        return np.geomspace(first, last, count).astype(np.float32)

    if method == K_QUANT:
        # In eighths of a level around the plain grid.
        only = 1 + np.arange(-8, 8) / (4.0 * (top + 1) if symmetric else 8.0 * top)
        return only.astype(np.float32), only.astype(np.float32)
    if top == EIGHT_BITS:  # which fit best close to the full range, and where each step meets codes of its own
        return geometric(0.93, 1.4, 12), geometric(0.94, 1.05, 24)
    # From a little wider than the block, where another phase of the grid may fit, to a seventh, for outliers; then the
    # more levels, the closer to it.
    return geometric(0.94, 6.7, 8), geometric(0.82, 1.23, 14) if top > POSITIVE else geometric(0.74, 1.35, 12)


@compiled()
def transpose(rows: Floats, tile: Tile) -> None:
    """Writes [LANES, N] as a tile."""
    for lane in range(LANES):
        for i in range(rows.shape[1]):
            tile[i, lane] = rows[lane, i]


@compiled()
def quantize(
    rows: Floats,
    importance: Floats | None,
    method: int,
    block: int,
    top: int,
    symmetric: bool,
    dtype: tuple[int, int, float],
    tried: tuple[Floats, Floats],
    codes: Codes,
    scales: Floats,
    zeros: Codes,
) -> int:
    """Quantizes a chunk of rows, LANES blocks at a time.

    Args:
        rows: [R, K].
        importance: [K] weights of the squared error; None is 1 for each.
        method: RTN, K_QUANT or MSE_SEARCH.
        block: weights that share a scale; a last block may be shorter.
        top: the largest code, 2^bits - 1.
        symmetric: whether every zero point is 2^(bits-1).
        dtype: of stored scales: significant bits, exponent of the least bit, largest number.
        tried: what ``steps`` returns.
        codes: [R, K], written.
        scales: [R, B], written.
        zeros: [R, B], written.

    Returns:
        DONE, NOT_FINITE or SCALE_OVERFLOW.
    """
    half = (top + 1) // 2
    digits, least, largest = dtype
    bits, in_row = rows.view(np.int32), scales.shape[1]
    size = min(block, rows.shape[1])
    blocks, given = np.zeros((LANES, size), np.float32), np.zeros((LANES, size), np.float32)
    searched = method != RTN
    tile = np.empty((size if searched else 0, LANES), np.float32)
    weights = np.empty((size if method == K_QUANT else 0, LANES), np.float32)
    weighing = None if importance is None else np.empty((size if searched else 0, LANES), np.float32)
    grids, exponents = np.zeros((FIGURES, LANES), np.float32), np.zeros(LANES, np.int64)
    limits = (np.float32(top), np.float32(digits))
    for n in range(rows.shape[0]):
        if not all_finite(rows[n]):
            return NOT_FINITE
    for first in range(0, scales.size, LANES):
        lanes = min(LANES, scales.size - first)
        for lane in range(lanes):
            n, b = (first + lane) // in_row, (first + lane) % in_row
            part = slice(b * block, min((b + 1) * block, rows.shape[1]))
            values = rows[n, part]
            exponents[lane], low, high = normalise(values, bits[n, part], blocks[lane, : values.size])
            blocks[lane, values.size :] = F0
            scale, zero = plain_grid(low, high, top, symmetric) if low < high else (F0, half if symmetric else 0)
            if not searched:
                scale = to_stored(scale, (digits, least - exponents[lane]))
            grids[LOW, lane], grids[HIGH, lane], grids[LEAST, lane] = low, high, least - exponents[lane]
            grids[SCALE, lane], grids[ZERO, lane], grids[SIZE, lane] = scale, zero, values.size
            if searched and importance is not None:
                given[lane, : values.size], given[lane, values.size :] = importance[part], F0
        if searched:
            transpose(blocks, tile)
            if weighing is not None:
                transpose(given, weighing)
            if method == K_QUANT:
                fit_k_quant(tile, weighing, weights, grids, symmetric, limits, tried[0])
            else:
                fit_mse(tile, weighing, grids, symmetric, limits, tried[0], tried[1])
        for lane in range(lanes):
            n, b = (first + lane) // in_row, (first + lane) % in_row
            part = slice(b * block, min((b + 1) * block, rows.shape[1]))
            scale, zero = grids[SCALE, lane], int(grids[ZERO, lane])
            if not grids[LOW, lane] < grids[HIGH, lane]:
                # ORT's symmetric scale of an all-zero block is -0.
                scale, zero = (-F0, half) if symmetric else (F0, 0)
            elif symmetric and zero != half:
                scale, zero = -scale, half
            encode(blocks[lane, : part.stop - part.start], scale, zero, top, codes[n, part])
            scales[n, b] = np.float32(scale * power_of_two(exponents[lane]))
            if not abs(scales[n, b]) <= largest:
                return SCALE_OVERFLOW
            zeros[n, b] = zero
    return DONE
