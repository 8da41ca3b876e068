"""Compiled loops of algorithms that weigh errors together: what one column's rounding does to the others' is known.

A chunk of rows [R, K] is quantized against a Hessian H [K, K], by which the error of a row e costs ``e H e^T``. Grids
are given; ``value = scale * (code - zero)``, where a scale may be negative, or with ``floats`` ``scale * e2m1(code)``.
"""

from __future__ import annotations

import numpy as np

from rewriter.quantize.compiling import compiled
from rewriter.quantize.four_bit_floats import LEVELS, nearest_level
from rewriter.quantize.kernels import F0, REORDER, Codes, Floats


@compiled(REORDER)
def nearest_code(level: np.float32, zero: np.float32, top: int, floats: bool) -> np.uint8:
    """Returns the code whose value, in units of the scale, is nearest."""
    if floats:
        return nearest_level(level)
    return np.uint8(np.rint(min(max(level + zero, F0), np.float32(top))))


@compiled(REORDER)
def level_of(code: np.uint8, zero: np.float32, floats: bool) -> np.float32:
    """Returns what a code stands for in units of the scale."""
    return LEVELS[code] if floats else np.float32(code) - zero


@compiled(REORDER)
def feed_forward(
    rows: Floats, factor: Floats, scales: Floats, zeros: Codes, top: int, floats: bool, codes: Codes
) -> None:
    """Rounds the columns of one block in turn; each one's error is made good by the columns after it.

    Args:
        rows: [R, C] of one block; the errors are written over them, each divided by the factor's diagonal.
        factor: [C, C] upper triangular U, of ``H^-1 = U^T U``.
        scales: [R].
        zeros: [R].
        top: the largest code.
        floats: whether codes are e2m1.
        codes: [R, C], written.
    """
    for r in range(rows.shape[0]):
        row, scale, zero = rows[r], scales[r], np.float32(zeros[r])
        inverse = np.float32(1) / scale if scale != F0 else F0
        for j in range(row.size):
            codes[r, j] = nearest_code(row[j] * inverse, zero, top, floats)
            error = (row[j] - level_of(codes[r, j], zero, floats) * scale) / factor[j, j]
            row[j] = error
            for i in range(j + 1, row.size):
                row[i] -= error * factor[j, i]


@compiled(REORDER)
def descend(
    codes: Codes,
    scales: Floats,
    zeros: Codes,
    block: int,
    top: int,
    floats: bool,
    hessian: Floats,
    rest: Floats,
    slope: Floats,
    sweeps: int,
) -> None:
    """Moves one code at a time to where the error is least while all others stay, until none moves.

    Args:
        codes: [R, K], changed.
        scales: [R, B].
        zeros: [R, B].
        block: columns that share a scale.
        top: the largest code.
        floats: whether codes are e2m1.
        hessian: [K, K], positive diagonal.
        rest: [R, K] what the codes leave of the weight; kept up to date.
        slope: [R, K] ``rest @ hessian``; kept up to date.
        sweeps: at most so many over all columns.
    """
    for r in range(codes.shape[0]):
        own, left, pull = codes[r], rest[r], slope[r]
        for _ in range(sweeps):
            moved = False
            for j in range(own.size):
                scale = scales[r, j // block]
                if scale == F0:
                    continue
                zero = np.float32(zeros[r, j // block])
                level = level_of(own[j], zero, floats)
                best = nearest_code(level + pull[j] / (hessian[j, j] * scale), zero, top, floats)
                better = level_of(best, zero, floats)
                if better != level:
                    step = (better - level) * scale
                    own[j] = best
                    left[j] -= step
                    for i in range(pull.size):
                        pull[i] -= step * hessian[j, i]
                    moved = True
            if not moved:
                break


@compiled(REORDER)
def refit_scales(
    codes: Codes, scales: Floats, zeros: Codes, block: int, hessian: Floats, rest: Floats, slope: Floats
) -> None:
    """Moves one scale at a time to where the error is least; arguments as those of ``descend``, scales changed."""
    levels = np.empty(codes.shape[1], np.float32)
    for r in range(codes.shape[0]):
        left, pull = rest[r], slope[r]
        for b in range(scales.shape[1]):
            first, last = b * block, min((b + 1) * block, codes.shape[1])
            zero = np.float32(zeros[r, b])
            gain, curve = F0, F0
            for j in range(first, last):
                levels[j] = np.float32(codes[r, j]) - zero
                gain += levels[j] * pull[j]
            for j in range(first, last):
                row = F0
                for i in range(first, last):
                    row += hessian[j, i] * levels[i]
                curve += levels[j] * row
            if curve <= F0:
                continue
            step = gain / curve
            scales[r, b] += step
            for j in range(first, last):
                change = step * levels[j]
                if change != F0:
                    left[j] -= change
                    for i in range(pull.size):
                        pull[i] -= change * hessian[j, i]
