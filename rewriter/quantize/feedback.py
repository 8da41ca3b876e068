"""Compiled loops of algorithms that weigh errors together: what one column's rounding does to the others' is known.

A chunk of rows [R, K] is quantized against a Hessian H [K, K], by which the error of a row e costs ``e H e^T``. Grids
are given; ``value = scale * (code - zero)``, and a scale may be negative.
"""

from __future__ import annotations

import numpy as np

from rewriter.quantize.kernels import F0, REORDER, Codes, Floats, compiled


@compiled(REORDER)
def feed_forward(rows: Floats, factor: Floats, scales: Floats, zeros: Codes, top: int, codes: Codes) -> None:
    """Rounds the columns of one block in turn; each one's error is made good by the columns after it.

    Args:
        rows: [R, C] of one block; the errors are written over them, each divided by the factor's diagonal.
        factor: [C, C] upper triangular U, of ``H^-1 = U^T U``.
        scales: [R].
        zeros: [R].
        top: the largest code.
        codes: [R, C], written.
    """
    for r in range(rows.shape[0]):
        row, scale, zero = rows[r], scales[r], np.float32(zeros[r])
        inverse = np.float32(1) / scale if scale != F0 else F0
        for j in range(row.size):
            code = np.rint(min(max(row[j] * inverse + zero, F0), np.float32(top)))
            codes[r, j] = np.uint8(code)
            error = (row[j] - (code - zero) * scale) / factor[j, j]
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
                code = np.float32(own[j])
                wanted = code + pull[j] / (hessian[j, j] * scale)
                best = np.rint(min(max(wanted, F0), np.float32(top)))
                if best != code:
                    step = (best - code) * scale
                    own[j] = np.uint8(best)
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
