"""Stacks: views along a new first axis, each read when it is written; and stacks scaled position by position."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from functools import cached_property

import numpy as np

from rewriter.tensors.names import common_prefix
from rewriter.tensors.view import RowsTensor, View, part_of


class Stack(RowsTensor):
    """Views of one shape and dtype along a new first axis.

    Attributes:
        parts: the views.
    """

    def __init__(self, parts: Sequence[View], name: str) -> None:
        super().__init__(
            lambda first, count: np.stack([part.numpy() for part in parts[first : first + count]]),
            parts[0].dtype,
            (len(parts), *parts[0].shape),
            name,
        )
        self.parts = tuple(parts)

    def shown(self, first: int, count: int) -> Iterable[View]:
        """Returns what rows are computed from."""
        return self.parts[first : first + count]

    def shown_by(self, view: View) -> View | None:
        """Returns what a view of one of the parts shows of it."""
        return part_of(self.parts, 0, view)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stack) and self.parts == other.parts

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Of all its parts, of which there may be hundreds: every view of the stack asks for it."""
        return hash(self.parts)


class StackedCopy(RowsTensor):
    """Views of one shape and dtype along a new axis that is not the first, as gate and linear rows in turn."""

    def __init__(self, views: Sequence[View], axis: int, name: str) -> None:
        shape = views[0].shape
        super().__init__(
            lambda first, count: np.stack([v.slice(0, first, count).numpy() for v in views], axis=axis),
            views[0].dtype,
            (*shape[:axis], len(views), *shape[axis:]),
            name,
            views,
        )
        self._axis = axis
        self._key: Hashable = (self.sources, axis)

    def shown_by(self, view: View) -> View | None:
        """Returns what a view of one of the views shows of it."""
        in_turn = view.size > math.prod(self.sources[0].shape[self._axis :]) and view.is_contiguous
        return None if in_turn else part_of(self.sources, self._axis, view)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StackedCopy) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


class Scaled(RowsTensor):
    """A view with every position of its first axis times a number of its own."""

    def __init__(self, view: View, factors: Sequence[float]) -> None:
        dtype = view.dtype.numpy()
        numbers = np.array(factors, np.float32).reshape(-1, *(1,) * (view.rank - 1))
        super().__init__(
            lambda first, count: (view.slice(0, first, count).numpy() * numbers[first : first + count]).astype(dtype),
            view.dtype,
            view.shape,
            view.name,
            (view,),
        )
        self._key = (view, tuple(factors))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scaled) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def stacked(views: Sequence[View]) -> View:
    """Returns views of one shape and dtype along a new first axis; of the stored tensor where they step evenly in it.

    Args:
        views: at least one.
    """
    merged = _merged(views)
    if merged is not None:
        return merged
    name = _common_name([view.name for view in views])
    return View.whole(Stack(views, name), name)


def interleaved(first: View, second: View) -> View:
    """Returns [E, 2 * N, ..]: the rows of two [E, N, ..] in turn; of the stored tensor where it holds them so."""
    experts, rows, *rest = first.shape
    shape = (experts, 2 * rows, *rest)
    merged = _merged((first, second))
    if merged is not None:
        turned = merged.transpose((1, 2, 0, *range(3, merged.rank))).reshape(shape)
        if not isinstance(turned.source, RowsTensor) or turned.source is first.source:
            return turned
    name = _common_name([first.name, second.name])
    return View.whole(StackedCopy((first, second), 2, name), name).reshape(shape)


def scaled(view: View, factors: Sequence[float]) -> View:
    """Returns a stack with each of its slices times a number."""
    return view if all(factor == 1 for factor in factors) else View.whole(Scaled(view, factors), view.name)


def _merged(views: Sequence[View]) -> View | None:
    first = views[0]
    step = views[1].offset - first.offset if len(views) > 1 else first.size
    for position, view in enumerate(views):
        same = (view.shape, view.strides, view.dtype) == (first.shape, first.strides, first.dtype)
        if not same or view.offset != first.offset + position * step or view.source != first.source:
            return None
    shape, strides = (len(views), *first.shape), (step, *first.strides)
    return View(first.source, first.name, first.offset, shape, strides, first.dtype)


def _common_name(names: Sequence[str]) -> str:
    return common_prefix(names).rstrip("._/0123456789") or names[0]
