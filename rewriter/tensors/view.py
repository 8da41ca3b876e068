"""Lazy views of constant tensors: slice, transpose, reshape and exact casts that touch no bytes until they are read.

What no view can show (two tensors interleaved, a reshape across strides, dequantized codes) is a ``RowsTensor``: it is
computed when it is read, and a view of a part of it computes only that part.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, Self, TypeGuard

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.tensors.strides import contiguous, reshaped, row_major, unravelled

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class View:
    """A strided window on a constant tensor; the same elements in the same order always make an equal view.

    Attributes:
        source: the tensor that holds the elements; compared by identity.
        name: name of the constant in the model; not compared.
        offset: index of the view's first element in the flattened source.
        shape: extent of each dimension.
        strides: elements between neighbours along each dimension; 0 where there are none.
        dtype: element type, the source's unless an exact cast was applied.
    """

    source: ir.TensorProtocol
    name: str = dataclasses.field(compare=False)
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: ir.DataType

    @classmethod
    def whole(cls, source: ir.TensorProtocol, name: str) -> View:
        """Returns the view of all of ``source``; of what it shows, where the source is itself a lazy view."""
        if isinstance(source, ViewTensor):
            return source.view
        shape = tuple(source.shape.numpy())
        return cls(source, name, 0, shape, contiguous(shape), source.dtype)

    def __post_init__(self) -> None:
        shape, strides = self.shape, self.strides
        if 0 in shape:
            object.__setattr__(self, "offset", 0)
            object.__setattr__(self, "strides", (0,) * len(strides))
        elif 1 in shape:
            strides = tuple([0 if extent == 1 else stride for extent, stride in zip(shape, strides, strict=True)])
            object.__setattr__(self, "strides", strides)

    def __hash__(self) -> int:
        return hash((self.source, self.offset, self.shape, self.strides))  # an enumeration is hashed by its name

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @cached_property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that the view takes when it is written."""
        return -(-self.size * self.dtype.bitwidth // 8)

    @property
    def is_whole(self) -> bool:
        """True where the view shows its source exactly as it is stored."""
        return self.shape == tuple(self.source.shape.numpy()) and self.is_contiguous and self.dtype == self.source.dtype

    @property
    def is_contiguous(self) -> bool:
        """True where the elements follow one another in memory."""
        wanted = 1
        for extent, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if extent != 1 and stride != wanted:
                return not self.size
            wanted *= extent
        return True

    def slice(self, axis: int, start: int, count: int, step: int = 1) -> View:
        """Returns ``count`` positions along ``axis`` from ``start``, ``step`` apart."""
        stride = self.strides[axis]
        shape, strides = _put(self.shape, axis, count), _put(self.strides, axis, stride * step)
        return self._shown(shape, strides, start * stride)

    def index(self, axis: int, position: int) -> View:
        """Returns the slice at ``position`` with ``axis`` removed."""
        return self._shown(_drop(self.shape, axis), _drop(self.strides, axis), position * self.strides[axis])

    def transpose(self, perm: Sequence[int]) -> View:
        """Returns the view with its dimensions in the order ``perm``."""
        return self._shown(tuple([self.shape[p] for p in perm]), tuple([self.strides[p] for p in perm]))

    @property
    def T(self) -> View:  # noqa: N802 -- the field's name for it
        """The view with its dimensions reversed."""
        return self.transpose(range(self.rank)[::-1])

    def reshape(self, shape: Sequence[int]) -> View:
        """Returns the same elements in another shape; copies (when read) only where no stride can say it."""
        shape = tuple(shape)
        strides = reshaped(self.shape, self.strides, shape)
        if strides is not None:
            return self._shown(shape, strides)
        return View.whole(ContiguousCopy(self), self.name)._shown(shape, contiguous(shape))

    def _shown(self, shape: tuple[int, ...], strides: tuple[int, ...], further: int = 0) -> View:
        """Another window, its first element ``further`` on; ``dataclasses.replace`` takes three times as long."""
        return View(self.source, self.name, self.offset + further, shape, strides, self.dtype)

    def cast(self, dtype: ir.DataType) -> View | None:
        """Returns the view in ``dtype`` where every value survives the cast, else None."""
        if dtype == self.dtype:
            return self
        return dataclasses.replace(self, dtype=dtype) if (self.dtype, dtype) in _EXACT_CASTS else None

    @property
    def unwidened(self) -> View:
        """The same elements in the type in which they are stored."""
        return dataclasses.replace(self, dtype=self.source.dtype)

    @cached_property
    def integers(self) -> tuple[int, ...]:
        """The elements, which are a few integers: read once."""
        return tuple(map(int, self.numpy().reshape(-1).tolist()))

    @cached_property
    def number(self) -> float:
        """The one element of a view that has no more: read once."""
        return float(np.asarray(self.numpy()).reshape(-1)[0])

    def numpy(self) -> Array:
        """Returns the elements; without a copy unless a cast is due."""
        source = self.source
        shown = source.shown_by(self) if self.size and is_in_rows(source) else None
        elements = self._elements() if shown is None else shown.numpy()
        return elements if self.dtype == source.dtype else elements.astype(self.dtype.numpy())

    def _elements(self) -> Array:
        """What the view shows of the part of the source that holds it; only to be read."""
        source, offset = self.source, self.offset
        if self.size and is_in_rows(source):
            first, count = source.shown_rows(self)
            part = source.rows(first, count)
            offset -= first * (part.size // count)
        else:
            part = np.asarray(source.numpy())
        flat = row_major(part).reshape(-1)
        if self.is_contiguous:  # which is most, and as_strided takes ten times as long
            window = flat[offset : offset + self.size].reshape(self.shape)
            window.flags.writeable = False
            return window
        steps = [step * flat.itemsize for step in self.strides]
        return np.lib.stride_tricks.as_strided(flat[offset:], self.shape, steps, writeable=False)

    @property
    def span(self) -> tuple[int, int]:
        """First and last position of the flattened source that the view shows."""
        low = high = self.offset
        for extent, stride in zip(self.shape, self.strides, strict=True):
            if stride < 0:
                low += (extent - 1) * stride
            else:
                high += (extent - 1) * stride
        return low, high

    @property
    def leaves(self) -> tuple[View, ...]:
        """The parts of constants that it shows: several where it stacks, joins or interleaves them."""
        source = self.source
        if not (self.size and is_in_rows(source)):
            return (self,)
        return tuple([leaf for view in source.shown(*source.shown_rows(self)) for leaf in view.leaves]) or (self,)

    @property
    def label(self) -> str:
        """The canonical name: ``<stack>__slice_<e>`` for one expert of a stack, ``__T`` where it is transposed."""
        outer = tuple(int(d) for d in self.source.shape.numpy())
        matrix = tuple((d, s) for d, s in zip(self.shape, self.strides, strict=True) if d != 1)
        inner = outer[1:]
        size = math.prod(inner)
        if self.is_whole or not size:
            return self.name
        stored = tuple((d, s) for d, s in zip(inner, contiguous(inner), strict=True) if d != 1)
        if matrix in (stored, stored[::-1]) and self.offset % size == 0 and len(outer) > 1:
            name = f"{self.name}__slice_{self.offset // size}"
            return name if matrix == stored else f"{name}__T"
        whole = tuple((d, s) for d, s in zip(outer, contiguous(outer), strict=True) if d != 1)
        return f"{self.name}__T" if matrix == whole[::-1] else f"{self.name}__view"

    @property
    def expert(self) -> int | None:
        """Index along the first axis of a stack of rank 3 or more, where the view shows just that one slice."""
        outer = tuple(int(d) for d in self.source.shape.numpy())
        size = math.prod(outer[1:])
        if len(outer) < 3 or not size or self.size != size or self.offset % size:
            return None
        return self.offset // size


class ViewTensor(ir.LazyTensor):
    """A view as a tensor of the model: read when it is written, and never kept."""

    def __init__(self, view: View) -> None:
        super().__init__(
            lambda: ir.Tensor(row_major(view.numpy()), dtype=view.dtype),
            dtype=view.dtype,
            shape=ir.Shape(view.shape),
            name=view.label,
        )
        self.view = view

    def __reduce__(self) -> tuple[Any, ...]:
        """What it shows, and none of it."""
        return type(self), (self.view,)

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for equal tensors, so that the commit can share them."""
        return "view", self.view.source if self.view.is_whole else self.view

    def tofile(self, file: Any) -> None:
        """Writes a stack one expert at a time."""
        if self.view.rank < 3 or self.view.dtype.bitwidth < 8:
            super().tofile(file)
            return
        for row in range(self.view.shape[0]):
            ir.Tensor(row_major(self.view.slice(0, row, 1).numpy()), dtype=self.dtype).tofile(file)


class RowsTensor(ir.LazyTensor):
    """A tensor that is computed when it is read, never kept, and written row by row (along its first axis).

    Attributes:
        rows: ``(first, count) -> [count, ...]``.
        sources: views with the same first axis, of what the rows are computed from.
    """

    _arguments: tuple[Any, ...]

    def __init__(
        self,
        rows: Callable[[int, int], Array],
        dtype: ir.DataType,
        shape: Sequence[int],
        name: str | None,
        sources: Sequence[View] = (),
    ) -> None:
        super().__init__(
            lambda: ir.Tensor(row_major(rows(0, shape[0])), dtype=dtype),
            dtype=dtype,
            shape=ir.Shape(shape),
            name=name,
        )
        self.rows = rows
        self.sources = tuple(sources)
        self._row = math.prod(shape[1:])

    def __new__(cls, *arguments: Any) -> Self:
        """Keeps what it is made of, by which another process makes it anew."""
        made = super().__new__(cls)
        made._arguments = arguments
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments

    def shown(self, first: int, count: int) -> Iterable[View]:
        """Returns what rows are computed from."""
        return (view.slice(0, first, count) for view in self.sources)

    def shown_rows(self, view: View) -> tuple[int, int]:
        """Returns the first of the rows along the first axis that a view of this tensor shows a part of, and how many.

        Args:
            view: one that shows at least one element.
        """
        low, high = view.span
        first = low // self._row
        return first, high // self._row - first + 1

    def shown_by(self, view: View) -> View | None:
        """Returns what a view of this tensor shows as one of what rows are computed from; None where it is a copy."""
        return None

    def tofile(self, file: Any) -> None:
        """Writes one row at a time, so that a stack of experts is never in memory whole."""
        for row in range(int(self.shape.numpy()[0])):
            ir.Tensor(row_major(self.rows(row, 1)), dtype=self.dtype).tofile(file)


def is_in_rows(tensor: ir.TensorProtocol) -> TypeGuard[RowsTensor]:
    """Tells a ``RowsTensor``: ``isinstance`` looks for every attribute of a protocol, which takes ten times as long."""
    return RowsTensor in type(tensor).__mro__


class ContiguousCopy(RowsTensor):
    """What a view shows, laid out afresh: the source of a reshape that strides cannot express."""

    def __init__(self, view: View) -> None:
        super().__init__(
            lambda first, count: row_major(view.slice(0, first, count).numpy()),
            view.dtype,
            view.shape,
            view.name,
            (view,),
        )
        self.view = view

    def shown_by(self, view: View) -> View | None:
        """Returns the part of the view that it is, where strides can say it."""
        return part_of((self.view,), 0, view)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ContiguousCopy) and self.view == other.view

    def __hash__(self) -> int:
        return hash(self.view)


def part_of(parts: Sequence[View], axis: int, view: View) -> View | None:
    """Returns a view of parts that are stacked along ``axis``, as one of a part; None where it shows several."""
    shape = (*parts[0].shape[:axis], len(parts), *parts[0].shape[axis:])
    found = unravelled(shape, view.offset, view.shape, view.strides)
    if found is None or any(step[axis] for step in found[1]):
        return None
    start, steps = found
    part = parts[start[axis]]
    strides = (*part.strides[:axis], 0, *part.strides[axis:])
    first, *others = (sum(map(operator.mul, moved, strides)) for moved in (start, *steps))
    return View(part.source, part.name, part.offset + first, view.shape, tuple(others), part.dtype)


def same_elements(a: View, b: View) -> bool:
    """Whether two views show the same bytes; read a few rows at a time, and no further than the first difference."""
    if a == b:
        return True
    if (a.shape, a.dtype) != (b.shape, b.dtype) or not a.rank:
        return False
    step = max(1, _COMPARED * a.shape[0] // max(a.nbytes, 1))
    for start in range(0, a.shape[0], step):
        count = min(step, a.shape[0] - start)
        if a.slice(0, start, count).numpy().tobytes() != b.slice(0, start, count).numpy().tobytes():
            return False
    return True


_COMPARED = 1 << 24
"""Bytes of each side that are compared at a time."""

_FLOATS = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_EXACT_CASTS = {(f, wide) for f in _FLOATS for wide in (ir.DataType.FLOAT, ir.DataType.DOUBLE)} | {
    (ir.DataType.FLOAT, ir.DataType.DOUBLE),
    (ir.DataType.INT32, ir.DataType.INT64),
}


def _put(items: tuple[int, ...], axis: int, item: int) -> tuple[int, ...]:
    return (*items[:axis], item, *items[axis + 1 :])


def _drop(items: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*items[:axis], *items[axis + 1 :])
