"""Strides: elements between neighbours along each dimension."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_TILE = 64
"""Positions of the last axis that are copied at a time where they are apart; all at once is four times slower."""


def row_major(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Returns the elements as they lie in a file, the last axis fastest; copied only where they do not."""
    if array.flags.c_contiguous:
        return array
    copy = np.empty(array.shape, array.dtype)
    step = array.shape[-1] if array.strides[-1] == array.itemsize else _TILE
    for first in range(0, array.shape[-1], step):
        copy[..., first : first + step] = array[..., first : first + step]
    return copy


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides)


def reshaped(shape: tuple[int, ...], strides: tuple[int, ...], target: tuple[int, ...]) -> tuple[int, ...] | None:
    """Strides of ``target`` over the same memory, or None where no strides can say it."""
    if 0 in target:
        return (0,) * len(target)
    runs: list[list[int]] = []  # [extent, stride] of maximal runs that step evenly through memory
    for extent, stride in zip(shape, strides, strict=True):
        if extent == 1:
            continue
        if runs and runs[-1][1] == extent * stride:
            runs[-1] = [runs[-1][0] * extent, stride]
        else:
            runs.append([extent, stride])
    result: list[int] = []
    left = 1
    stride = 0
    for extent in reversed(target):
        if extent == 1:
            result.append(0)
            continue
        if left == 1:
            if not runs:
                return None
            left, stride = runs.pop()
        if left % extent:
            return None
        result.append(stride)
        stride *= extent
        left //= extent
    return tuple(reversed(result)) if left == 1 and not runs else None


def unravelled(
    shape: Sequence[int], offset: int, extents: Sequence[int], strides: Sequence[int]
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]] | None:
    """Splits a window on elements that lie contiguously in ``shape`` into coordinates.

    Returns:
        The coordinates of its first element, and the step of each of its dimensions in them; None where a dimension
        runs from one row of an axis into the next.
    """

    def split(number: int) -> tuple[int, ...]:
        return tuple(number // stride % extent for stride, extent in zip(contiguous(shape), shape, strict=True))

    if min(strides, default=0) < 0:
        return None
    start, steps = split(offset), tuple(map(split, strides))
    for axis, extent in enumerate(shape):
        most = start[axis] + sum(step[axis] * (count - 1) for step, count in zip(steps, extents, strict=True))
        if most >= extent:
            return None
    return start, steps
