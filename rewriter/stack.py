"""Stacks: a tensor made of views, one for each position of a new first axis, read and written one at a time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from rewriter.tensors import Array, View, ViewTensor, reordered

_SMALL = 1 << 26
"""Bytes up to which a tensor is computed whole; larger ones are streamed."""


class StackTensor(ir.LazyTensor):
    """Views of one shape and type along a new first axis.

    Attributes:
        parts: the views.
        key: equal for equal tensors, so that the commit can share them.
    """

    def __init__(self, parts: Sequence[View], name: str) -> None:
        first = parts[0]
        super().__init__(
            lambda: ir.Tensor(np.stack([part.numpy() for part in self.parts]), dtype=first.dtype),
            dtype=first.dtype,
            shape=ir.Shape((len(parts), *first.shape)),
            name=name,
        )
        self.parts = tuple(parts)

    @property
    def key(self) -> tuple[object, ...]:
        return ("stack", self.parts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StackTensor) and self.parts == other.parts

    def __hash__(self) -> int:
        return hash(self.parts)

    def elements(self, first: int, last: int) -> tuple[Array, int]:
        """Returns the flattened parts that hold elements ``first`` to ``last``, and where the first part begins."""
        size = self.parts[0].size
        start, stop = first // size, last // size + 1
        return np.concatenate([part.numpy().reshape(-1) for part in self.parts[start:stop]]), start * size

    def tofile(self, file: Any) -> None:
        """Writes the parts one after the other; only one is in memory."""
        for part in self.parts:
            ir.Tensor(np.asarray(part.numpy(), order="C"), dtype=part.dtype).tofile(file)


class Scaled(ir.LazyTensor):
    """What a view shows times a number, rounded once."""

    def __init__(self, view: View, factor: float) -> None:
        dtype = view.dtype.numpy()
        super().__init__(
            lambda: ir.Tensor((view.numpy() * np.asarray(factor, dtype)).astype(dtype), dtype=view.dtype),
            dtype=view.dtype,
            shape=ir.Shape(view.shape),
            name=view.name,
        )
        self.view = view
        self._factor = factor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scaled) and (self.view, self._factor) == (other.view, other._factor)

    def __hash__(self) -> int:
        return hash((self.view, self._factor))


def stacked(views: Sequence[View]) -> View:
    """Returns views of one shape and type along a new first axis; of one stored tensor where they step evenly in it."""
    first = views[0]
    step = views[1].offset - first.offset if len(views) > 1 else first.size
    if all(
        view.source == first.source
        and (view.shape, view.strides, view.dtype) == (first.shape, first.strides, first.dtype)
        and view.offset == first.offset + position * step
        for position, view in enumerate(views)
    ):
        return View(
            first.source, first.name, first.offset, (len(views), *first.shape), (step, *first.strides), first.dtype
        )
    return View.whole(StackTensor(views, _name(views)), _name(views))


def interleaved(views: Sequence[View]) -> View:
    """Returns the rows of [N, ..] views in turn: [len(views) * N, ..]."""
    together = stacked(views)
    count, rows, *rest = together.shape
    order = (1, 0, *range(2, together.rank))
    return together.transpose(order).reshape((count * rows, *rest))


def scaled(view: View, factor: float) -> View:
    """Returns the view with every element times ``factor``."""
    return view if factor == 1 else View.whole(Scaled(view, factor), view.name)


def tensor_of(view: View, name: str) -> ir.LazyTensor:
    """Returns a view as a tensor of the model, which is never whole in memory where it is large and not stored so."""
    source = view.source
    if isinstance(source, StackTensor) and view.is_whole:
        return StackTensor(source.parts, name)
    if view.nbytes <= _SMALL or view.is_contiguous or view.rank < 2:
        tensor = ViewTensor(view)
    else:
        return StackTensor([view.index(0, position) for position in range(view.shape[0])], name)
    tensor.name = tensor.name if view.is_whole else name
    return tensor


def _name(views: Sequence[View]) -> str:
    names = [view.name for view in views]
    return os.path.commonprefix(names).rstrip("._/0123456789") or names[0]


__all__ = ["Scaled", "StackTensor", "interleaved", "reordered", "scaled", "stacked", "tensor_of"]
