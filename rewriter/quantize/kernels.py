"""Compiled kernels: blocks in, their codes, scales and zero points out.

They share one file because the cache of compiled code is renewed when the file of a kernel changes, not when the
files of what it calls do; only the type of lanes and the reading of halves stand apart.

A block is fitted in a scratch copy, divided by a power of two so that no square over- or underflows. Its grid is
``scale * (code - zero)``; the scale is positive. A symmetric grid with a negative scale is written as its mirror image,
with zero point half - 1, until the end.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rewriter.quantize.compiling import compiled
from rewriter.quantize.halves import Halves, widen
from rewriter.quantize.lanes import (
    LANES,
    TURNED,
    Lanes,
    Tile,
    any_less,
    exponents_of,
    fill,
    fma,
    four_bytes,
    if_less,
    load,
    maximum,
    minimum,
    powers_of_two,
    rint,
    sqrt,
    store,
    turn,
)

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]
Stored = tuple[int, int]
"""Of the dtype of stored scales: significant bits, and exponent of the least bit, both seen from the scratch copy."""

Tried = tuple[Floats, Floats, Floats]
"""By what the scales of three searches in turn are divided."""

RTN, K_QUANT, MSE_SEARCH = 0, 1, 2
DONE, NOT_FINITE, SCALE_OVERFLOW = 0, 1, 2

ROUNDS = 2
"""How often the best scale of a search, rounded as it will be stored, is fitted to its codes."""

POSITIVE, EIGHT_BITS = 7, 255
"""The largest codes of 3 bits, of which no runtime takes negative scales, and of 8 bits."""

LOW, HIGH, LEAST, SCALE, ZERO, SIZE, NEAR, EXPONENT, FIGURES = range(9)
"""Rows of the figures that are kept of every block: its range, the exponent of the least bit of a stored scale, its
grid, how many weights it has, and by what it was multiplied and then divided: 2^EXPONENT."""

FAR, NEARER = np.float32(2.0**60), np.float32(2.0**64)
"""Beyond this, blocks are first brought nearer to 1 by that, so that powers of two are float32 numbers."""

SHIFT, HIGHEST = np.float32(23), np.float32(100)
"""Bits after the leading one of a float32, and an exponent that no scale of a scratch copy comes near."""

SAME_LEVEL = np.float32(1e-6)
"""Relative variance of the levels below which they define no line."""

NEARBY = 64
"""Columns that are transposed before the next ones: what is read and written of them stays in the fastest cache."""

FILLED = 4 * TURNED
"""Weights of a block are filled up to a multiple of this, so that their codes can be transposed four to a number."""

F0, F1, HALF, TINY = np.float32(0), np.float32(1), np.float32(0.5), np.float32(1e-30)
INFINITY = np.float32(np.inf)
LARGEST = np.float32(3.4028234663852886e38)
MAGNITUDE = np.int32(0x7FFFFFFF)

REORDER = {"reassoc", "contract", "nsz"}
"""Lets sums become vector sums, and leaves NaN and infinity as they are."""


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


@compiled()
def residuals(
    tile: Tile, weights: Tile | None, squares: Lanes, inverse: Lanes, zero: Lanes, top: Lanes, closely: bool
) -> tuple[Lanes, Lanes, Lanes]:
    """Rounds blocks to a grid each.

    Args:
        tile: the blocks.
        weights: of the squares, a tile; None is 1 for each.
        squares: weighted sums of the blocks' squares, of no matter ``closely``.
        inverse: 1 / scale.
        zero: zero point.
        top: the largest code.
        closely: sum what is left number by number; otherwise it is the difference of two sums, which takes less time
            and is as good where levels are few.

    Returns:
        The weighted sums of r*r, t*r and t*t, where t is the level (code - zero) and r the rest, in units of the scale.
    """
    low, high = fill(F0) - zero, top - zero
    rr, te, tt = fill(F0), fill(F0), fill(F0)
    for i in range(tile.shape[0]):
        exact = load(tile, i) * inverse
        t = rint(minimum(maximum(exact, low), high))
        wt = t if weights is None else t * load(weights, i)
        te, tt = fma(wt, exact, te), fma(wt, t, tt)
        if closely:
            r = exact - t
            rr = fma(r if weights is None else r * load(weights, i), r, rr)
    if not closely:
        rr = squares * inverse * inverse - te - (te - tt)
    return rr, te - tt, tt


@compiled()
def line_residuals(
    tile: Tile, weights: Tile, squares: Lanes, inverse: Lanes, low: Lanes, top: Lanes, closely: bool
) -> tuple[Lanes, Lanes, Lanes, Lanes]:
    """As ``residuals`` for grids that start at ``low``, with the sum of t.

    The weights and ``squares`` are those of (value - low).
    """
    rr, te, tt, t_sum = fill(F0), fill(F0), fill(F0), fill(F0)
    lowest = low * inverse
    for i in range(tile.shape[0]):
        exact = load(tile, i) * inverse - lowest
        t = rint(minimum(exact, top))
        weight = load(weights, i)
        wt = weight * t
        te, tt, t_sum = fma(wt, exact, te), fma(wt, t, tt), t_sum + wt
        if closely:
            r = exact - t
            rr = fma(weight * r, r, rr)
    if not closely:
        rr = squares * inverse * inverse - te - (te - tt)
    return rr, te - tt, tt, t_sum


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
    error, best = fill(INFINITY), fill(F0)
    for _ in range(rounds):
        scale = as_stored(scale, digits, least)
        inverse = fill(F1) / maximum(scale, fill(TINY))
        rr, tr, tt = residuals(tile, weights, error, inverse, zero, top, True)
        this = if_less(fill(F0), scale, scale * scale * rr, fill(INFINITY))
        best = if_less(this, error, scale, best)
        error = minimum(this, error)
        scale = scale * (fill(F1) + tr / maximum(tt, fill(TINY)))
    return error, best


@compiled(inline=False)
def best_scale(
    tile: Tile, weights: Tile | None, scale: Lanes, zero: Lanes, top: Lanes, steps: Floats, closely: bool
) -> tuple[Lanes, Lanes]:
    """Returns the least-squares scale of the codes that the best of ``scale / steps`` gives, after its error."""
    inverse, squares = fill(F1) / scale, fill(F0)
    for i in range(tile.shape[0]):
        value = load(tile, i)
        squares = fma(value if weights is None else value * load(weights, i), value, squares)
    error, best = fill(INFINITY), scale
    for n in range(steps.size):
        tried = inverse * fill(steps[n])
        rr, tr, tt = residuals(tile, weights, squares, tried, zero, top, closely)
        unit = fill(F1) / tried
        change = tr / maximum(tt, fill(TINY))
        this = (rr - change * tr) * (unit * unit)
        best = if_less(this, error, fma(unit, change, unit), best)
        error = minimum(this, error)
    return error, best


@compiled(inline=False)
def best_line(
    tile: Tile, weights: Tile, scale: Lanes, low: Lanes, top: Lanes, steps: Floats, closely: bool
) -> tuple[Lanes, Lanes]:
    """Returns slope and start of the least-squares line through the codes of the best of ``scale / steps``."""
    inverse, total, sums, squares = fill(F1) / scale, fill(F0), fill(F0), fill(F0)
    for i in range(weights.shape[0]):
        weight, value = load(weights, i), load(tile, i) - low
        total, sums, squares = total + weight, fma(weight, value, sums), fma(weight * value, value, squares)
    error, best, first = fill(INFINITY), scale, low
    for n in range(steps.size):
        tried = inverse * fill(steps[n])
        rr, tr, tt, t = line_residuals(tile, weights, squares, tried, low, top, closely)
        unit, r = fill(F1) / tried, sums * tried - t
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
    tried: Tried,
) -> None:
    """See ``rewriter.quantize.k_quant``; never worse than round-to-nearest."""
    low, least, sizes = load(grids, LOW), load(grids, LEAST), load(grids, SIZE)
    plain, plain_zero = load(grids, SCALE), load(grids, ZERO)
    top, digits, closely = fill(limits[0]), limits[1], limits[0] == EIGHT_BITS
    k_quant_weights(tile, importance, sizes, weights)
    zero = plain_zero
    if symmetric:
        _, scale = best_scale(tile, weights, plain, zero, top, tried[0], closely)
    else:
        scale, start = best_line(tile, weights, plain, low, top, tried[0], closely)
        fitted = rint(minimum(maximum((fill(F0) - start) / scale, fill(F0)), top))
        zero = if_less(fill(F0), scale, fitted, zero)
    _, scale = best_scale(tile, importance, scale, zero, top, tried[2], closely)
    error, best = refit(tile, importance, scale, zero, top, digits, least, ROUNDS)
    if not symmetric:
        _, scale = best_scale(tile, importance, plain, plain_zero, top, tried[2], closely)
        other_error, other = refit(tile, importance, scale, plain_zero, top, digits, least, ROUNDS)
        best, zero = if_less(other_error, error, other, best), if_less(other_error, error, plain_zero, zero)
        error = minimum(other_error, error)
    plain_error, plain = refit(tile, importance, plain, plain_zero, top, digits, least, 1)
    store(grids, SCALE, if_less(error, plain_error, best, plain))
    store(grids, ZERO, if_less(error, plain_error, zero, plain_zero))


@compiled(inline=False)
def fit_mse(
    tile: Tile,
    importance: Tile | None,
    grids: Tile,
    symmetric: bool,
    limits: tuple[np.float32, np.float32],
    tried: Tried,
) -> None:
    """See ``rewriter.quantize.mse_search``; never worse than round-to-nearest."""
    low, high, least = load(grids, LOW), load(grids, HIGH), load(grids, LEAST)
    plain, plain_zero = load(grids, SCALE), load(grids, ZERO)
    top, digits, one, closely = fill(limits[0]), limits[1], fill(F1), limits[0] == EIGHT_BITS
    mirrors = 2 if symmetric and limits[0] != POSITIVE else 1
    error, scale, zero = fill(INFINITY), plain, plain_zero
    for mirror in range(mirrors):
        start = fill((limits[0] + F1) * HALF - np.float32(mirror)) if symmetric else plain_zero
        widest = maximum((fill(F0) - low) / maximum(start, one), high / maximum(top - start, one))
        _, around = best_scale(tile, importance, widest, start, top, tried[0], closely)
        last = start
        for step in range(1 if symmetric else int(limits[0]) + 1):
            there = start + fill(F1 if step == 1 else -F1 if step == 2 else F0)
            if step > 2:
                if not (any_less(last, zero) or any_less(zero, last)):
                    break
                there, last = zero + (zero - last), zero
            there = minimum(maximum(there, fill(F0)), top)
            this_error, this = best_scale(tile, importance, around, there, top, tried[1], closely)
            scale = if_less(this_error, error, this, scale)
            zero = if_less(this_error, error, there, zero)
            error = minimum(this_error, error)
    _, scale = best_scale(tile, importance, scale, zero, top, tried[2], closely)
    error, best = refit(tile, importance, scale, zero, top, digits, least, ROUNDS)
    plain_error, plain = refit(tile, importance, plain, plain_zero, top, digits, least, 1)
    store(grids, SCALE, if_less(error, plain_error, best, plain))
    store(grids, ZERO, if_less(error, plain_error, zero, plain_zero))


@compiled()
def transpose(rows: Floats, first: int, tile: Tile) -> None:
    """Writes LANES rows from the first one on, [LANES, N], as a tile."""
    for part in range(0, rows.shape[1], NEARBY):
        for row in range(0, LANES, TURNED):
            for column in range(part, min(part + NEARBY, rows.shape[1]), TURNED):
                turn(rows, first + row, column, tile, column, row)


@compiled()
def transpose_back(tile: Tile, rows: Floats, first: int) -> None:
    """Writes a tile to LANES rows from the first one on."""
    for part in range(0, rows.shape[1], NEARBY):
        for row in range(0, LANES, TURNED):
            for column in range(part, min(part + NEARBY, rows.shape[1]), TURNED):
                turn(tile, column, row, rows, first + row, column)


@compiled(inline=False)
def normalise(tile: Tile, grids: Tile, least: int) -> bool:
    """Divides blocks by a power of two each, so that the largest magnitude is in [0.5, 1), and writes their figures.

    Returns:
        Whether all values were finite; if not, what is written means nothing.
    """
    low, high, finite = fill(F0), fill(F0), fill(F0)
    for i in range(tile.shape[0]):
        value = load(tile, i)
        low, high, finite = minimum(value, low), maximum(value, high), fma(value, fill(F0), finite)
    if any_less(fill(F0), if_less(finite, fill(F1), fill(F0), fill(F1))):  # NaN is less than nothing
        return False
    most = maximum(fill(F0) - low, high)
    near = if_less(most, fill(F1 / FAR), fill(NEARER), if_less(fill(FAR), most, fill(F1 / NEARER), fill(F1)))
    exponent = exponents_of(most * near)
    factor = powers_of_two(fill(F0) - exponent)
    for i in range(tile.shape[0]):
        store(tile, i, load(tile, i) * near * factor)
    store(grids, LOW, low * near * factor)
    store(grids, HIGH, high * near * factor)
    store(grids, NEAR, near)
    store(grids, EXPONENT, exponent)
    store(grids, LEAST, fill(np.float32(least - 1)) - exponent + exponents_of(near))
    return True


@compiled()
def round_half_away(value: Lanes) -> Lanes:
    """Rounds non-negative numbers as C's ``roundf``, which ORT uses."""
    even = rint(value)
    return if_less(value - even, fill(HALF), even, even + fill(F1))


@compiled(inline=False)
def plain_grids(grids: Tile, symmetric: bool, limits: tuple[np.float32, np.float32]) -> None:
    """Writes the scales and zero points that round-to-nearest reads off the ranges of blocks."""
    low, high, top = load(grids, LOW), load(grids, HIGH), fill(limits[0])
    half = fill((limits[0] + F1) * HALF)
    below = fill(F0) - low
    if symmetric and limits[0] == POSITIVE:
        scale, zero = maximum(below / half, high / (half - fill(F1))), half
    elif symmetric:
        scale, zero = maximum(below, high) / half, if_less(below, high, half - fill(F1), half)
    else:
        scale = (high - low) / top
        zero = round_half_away(minimum(below / scale, top))
    store(grids, SCALE, if_less(low, high, scale, fill(F0)))
    store(grids, ZERO, if_less(low, high, zero, half if symmetric else fill(F0)))


@compiled(inline=False)
def encode(tile: Tile, grids: Tile, symmetric: bool, limits: tuple[np.float32, np.float32], codes: Tile) -> None:
    """Writes the nearest codes of blocks, four to a number, and their grids as they are stored.

    The float32 operations on the weights and their order are ORT's, and so is the symmetric scale of a block of zeros,
    which is -0.
    """
    scale, zero, top = load(grids, SCALE), load(grids, ZERO), fill(limits[0])
    if symmetric:
        half = fill((limits[0] + F1) * HALF)
        scale = if_less(zero, half, fill(-F1) * scale, scale)
        scale = if_less(load(grids, LOW), load(grids, HIGH), scale, fill(-F0))
        zero = half
    inverse = fill(F1) / scale
    inverse = if_less(fill(F0), scale, inverse, if_less(scale, fill(F0), inverse, fill(F0)))
    for i in range(codes.shape[0]):
        a, b, c, d = (
            code(load(tile, 4 * i), inverse, zero, top),
            code(load(tile, 4 * i + 1), inverse, zero, top),
            code(load(tile, 4 * i + 2), inverse, zero, top),
            code(load(tile, 4 * i + 3), inverse, zero, top),
        )
        store(codes, i, four_bytes(a, b, c, d))
    store(grids, SCALE, scale * powers_of_two(load(grids, EXPONENT)) / load(grids, NEAR))
    store(grids, ZERO, zero)


@compiled()
def code(value: Lanes, inverse: Lanes, zero: Lanes, top: Lanes) -> Lanes:
    """Returns the nearest codes."""
    return round_half_away(minimum(maximum(value * inverse + zero, fill(F0)), top))


@compiled(inline=False)
def quantize(
    blocks: Floats,
    halves: Halves,
    importance: Floats | None,
    lengths: Floats,
    method: int,
    top: int,
    symmetric: bool,
    dtype: tuple[int, int, float],
    tried: Tried,
    codes: Codes,
    scales: Floats,
    zeros: Codes,
) -> int:
    """Quantizes T >= LANES blocks, LANES at a time.

    Args:
        blocks: [T, N], each filled up with zeros to N, a multiple of FILLED; of no rows where ``halves`` has some.
        halves: [T, N], the blocks as the bits of float16 numbers; of no rows where ``blocks`` has some.
        importance: [B + LANES, N] weights of the squared error, of the blocks of a row over and over; None is 1 for
            each.
        lengths: [B + LANES] weights in each block of a row, over and over.
        method: RTN, K_QUANT or MSE_SEARCH.
        top: the largest code, 2^bits - 1.
        symmetric: whether every zero point is 2^(bits-1).
        dtype: of stored scales: significant bits, exponent of the least bit, largest number.
        tried: what ``steps`` returns.
        codes: [T, N], written.
        scales: [T, 1], written.
        zeros: [T, 1], written.

    Returns:
        DONE, NOT_FINITE or SCALE_OVERFLOW.
    """
    digits, least, largest = dtype
    size, in_row, four_codes = codes.shape[1], lengths.size - LANES, codes.view(np.float32)
    tile, coded = np.empty((size, LANES), np.float32), np.empty((size // 4, LANES), np.float32)
    weights = np.empty((size if method == K_QUANT else 0, LANES), np.float32)
    widened, flat = np.empty((LANES if halves.shape[0] else 0, size), np.float32), halves.reshape(-1)
    weighing = None if importance is None else np.empty((size, LANES), np.float32)
    grids, limits = np.empty((FIGURES, LANES), np.float32), (np.float32(top), np.float32(digits))
    for group in range(0, scales.size, LANES):
        first = min(group, scales.size - LANES)
        if halves.shape[0]:
            widen(flat[first * size : (first + LANES) * size], widened.reshape(-1))
            transpose(widened, 0, tile)
        else:
            transpose(blocks, first, tile)
        if not normalise(tile, grids, least):
            return NOT_FINITE
        plain_grids(grids, symmetric, limits)
        if method == RTN:
            store(grids, SCALE, as_stored(load(grids, SCALE), limits[1], load(grids, LEAST)))
        else:
            grids[SIZE] = lengths[first % in_row : first % in_row + LANES]
            if importance is not None and weighing is not None:
                transpose(importance, first % in_row, weighing)
            if method == K_QUANT:
                fit_k_quant(tile, weighing, weights, grids, symmetric, limits, tried)
            else:
                fit_mse(tile, weighing, grids, symmetric, limits, tried)
        encode(tile, grids, symmetric, limits, coded)
        transpose_back(coded, four_codes, first)
        for lane in range(LANES):
            scale = grids[SCALE, lane]
            if not abs(scale) <= largest:
                return SCALE_OVERFLOW
            scales[first + lane, 0], zeros[first + lane, 0] = scale, np.uint8(grids[ZERO, lane])
    return DONE
