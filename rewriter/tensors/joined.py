"""Views one after another along an axis: of the stored tensor where they lie so in it, else copied when written."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from rewriter.tensors.view import Array, RowsTensor, View

_ROWS = 1024
"""Rows that are joined at a time, as they are written."""


class Joined(RowsTensor):
    """Views along an axis that they have; all else of their shapes is one.

    Attributes:
        parts: the views.
        axis: 0 or more.
    """

    def __init__(self, parts: Sequence[View], axis: int, name: str) -> None:
        first = parts[0]
        extent = sum(part.shape[axis] for part in parts)
        shape = (*first.shape[:axis], extent, *first.shape[axis + 1 :])
        super().__init__(self._joined, first.dtype, shape, name)
        self.parts = tuple(parts)
        self.axis = axis

    def shown(self, first: int, count: int) -> Iterator[View]:
        """Returns what rows are computed from."""
        if self.axis:
            yield from (part.slice(0, first, count) for part in self.parts)
            return
        for part in self.parts:
            start, stop = max(first, 0), min(first + count, part.shape[0])
            if start < stop:
                yield part.slice(0, start, stop - start)
            first -= part.shape[0]

    def tofile(self, file: Any) -> None:
        """Writes a few rows at a time."""
        rows = int(self.shape.numpy()[0])
        for first in range(0, rows, _ROWS):
            ir.Tensor(self._joined(first, min(_ROWS, rows - first)), dtype=self.dtype).tofile(file)

    def _joined(self, first: int, count: int) -> Array:
        shown = [view.numpy() for view in self.shown(first, count)]
        return np.concatenate(shown, axis=self.axis) if shown else np.empty((0, *self.shape.numpy()[1:]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Joined) and (self.parts, self.axis) == (other.parts, other.axis)

    def __hash__(self) -> int:
        return hash((self.parts, self.axis))


def joined(views: Sequence[View], axis: int, name: str) -> View:
    """Returns the views one after another along ``axis``; all else of their shapes, and their dtype, must be one.

    Args:
        views: at least one.
        axis: 0 or more.
        name: of the result, where it is not stored.
    """
    first = views[0]
    if all(_follows(a, b, axis) for a, b in itertools.pairwise(views)):
        extent = sum(view.shape[axis] for view in views)
        return dataclasses.replace(first, shape=(*first.shape[:axis], extent, *first.shape[axis + 1 :]))
    return View.whole(Joined(views, axis, name), name)


def _follows(a: View, b: View, axis: int) -> bool:
    stride = a.strides[axis]
    return (
        a.source == b.source
        and a.dtype == b.dtype
        and a.strides == b.strides
        and stride > 0
        and b.offset == a.offset + a.shape[axis] * stride
    )
