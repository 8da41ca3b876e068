"""Tensors that are computed when they are read, row by row: what no view of one stored tensor can show."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

if TYPE_CHECKING:
    from rewriter.tensors import View

Array = npt.NDArray[Any]


class RowsTensor(ir.LazyTensor):
    """A tensor that is computed when it is read, never kept, and written row by row (along its first axis).

    Attributes:
        rows: ``(first, count) -> [count, ...]``.
        sources: views with the same first axis, of what the rows are computed from.
    """

    def __init__(
        self,
        rows: Callable[[int, int], Array],
        dtype: ir.DataType,
        shape: Sequence[int],
        name: str | None,
        sources: Sequence[View] = (),
    ) -> None:
        super().__init__(
            lambda: ir.Tensor(np.asarray(rows(0, shape[0]), order="C"), dtype=dtype),
            dtype=dtype,
            shape=ir.Shape(shape),
            name=name,
        )
        self.rows = rows
        self.sources = tuple(sources)

    def shown(self, first: int, count: int) -> Iterable[View]:
        """Returns what rows are computed from."""
        return (view.slice(0, first, count) for view in self.sources)

    def tofile(self, file: Any) -> None:
        """Writes one row at a time, so that a stack of experts is never in memory whole."""
        for row in range(int(self.shape.numpy()[0])):
            ir.Tensor(np.asarray(self.rows(row, 1), order="C"), dtype=self.dtype).tofile(file)


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
        self._key: Hashable = (self.sources, axis)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StackedCopy) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)
