"""Changes of constants: of their numbers, shapes and element types, and of which share a tensor."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.testing.change.bodies import Bodies, Constant, Place, neighbours
from rewriter.testing.change.legal import swapped_neighbours

Array = npt.NDArray[Any]

_FEW = 8
_NARROW = {
    ir.DataType.INT64: ir.DataType.INT32,
    ir.DataType.INT32: ir.DataType.INT64,
}
_STORED = {ir.DataType.FLOAT: ir.DataType.FLOAT16, ir.DataType.FLOAT16: ir.DataType.FLOAT}


def number_changed(bodies: Bodies) -> Iterator[Place]:
    """One element of a constant (an index, an axis, a size, a weight, a scale, a zero point) is another number."""
    for constant in bodies.constants:
        for where in _elements(constant.array):
            yield from _changed(constant, where)


def numbers_swapped(bodies: Bodies) -> Iterator[Place]:
    """Two neighbours in a list of integers (a shape, axes, lengths) stand in each other's place."""
    for constant in _lists(bodies):
        for other in swapped_neighbours(tuple(constant.array.tolist())):
            yield _put(constant, np.array(other, constant.array.dtype), f"{constant.array.tolist()} -> {list(other)}")


def number_dropped(bodies: Bodies) -> Iterator[Place]:
    """A list of integers lacks its last."""
    for constant in _lists(bodies):
        if constant.array.size > 1:
            yield _put(constant, constant.array[:-1], f"{constant.array.tolist()} without its last element")


def rows_swapped(bodies: Bodies) -> Iterator[Place]:
    """Two rows of a table, or two experts of a stack, stand in each other's place."""
    for constant in bodies.constants:
        array = constant.array
        if array.ndim > 1 and len(array) > 1 and not np.array_equal(array[0], array[1]):
            order = [1, 0, *range(2, len(array))]
            yield _put(constant, array[order], "rows 0 and 1 swapped")


def shape_changed(bodies: Bodies) -> Iterator[Place]:
    """A constant has a dimension of 1 more, or one less."""
    for constant in bodies.constants:
        shape = constant.array.shape
        forms = [(1, *shape)] + [shape[1:]] * (shape[:1] == (1,)) + [(*shape, 1)] * (len(shape) == 1)
        for form in forms:
            yield _put(constant, constant.array.reshape(form), f"shape {list(shape)} -> {list(form)}")


def type_changed(bodies: Bodies) -> Iterator[Place]:
    """A constant is stored in another element type: integers plainly, floats behind a Cast."""
    for constant in bodies.constants:
        narrow, stored = _NARROW.get(constant.dtype), _STORED.get(constant.dtype)
        if narrow is not None:
            yield Place(f"{_label(constant)}: {constant.dtype} -> {narrow}", partial(_narrow, constant, narrow))
        if stored is not None:
            what = f"{_label(constant)}: stored as {stored}, behind a Cast"
            yield Place(what, partial(_cast, bodies, constant, stored))


def unshared(bodies: Bodies) -> Iterator[Place]:
    """The last reader of a shared constant reads one of its own, equal or not."""
    for constant in bodies.constants:
        uses = list(constant.value.uses())
        if len(uses) > 1:
            (node, index), label = uses[-1], _label(constant)
            yield Place(f"{label}: its last reader has a copy", partial(_own, bodies, constant, node, index))
            for where in list(_elements(constant.array))[:1]:
                for other in list(_other_numbers(constant, where))[:1]:
                    what = f"{label}: its last reader has a copy, {list(where)} changed"
                    yield Place(what, partial(_own, bodies, constant, node, index, (where, other)))


def shared(bodies: Bodies) -> Iterator[Place]:
    """A constant is another one of its shape: both have the same readers."""
    stored = [constant for constant in bodies.constants if constant.value.producer() is None]
    for one, other in neighbours(stored, lambda c: (c.dtype, c.array.shape, id(c.value.graph))):
        yield Place(
            f"{_label(other)}: '{one.name}' in its place", partial(other.value.replace_all_uses_with, one.value)
        )


def _changed(constant: Constant, where: tuple[int, ...]) -> Iterator[Place]:
    for other in _other_numbers(constant, where):
        array = _with(constant.array, where, other)
        place = str(list(where)) if where else ""
        yield _put(constant, array, f"{constant.array[where]}{' at ' * bool(place)}{place} -> {array[where]}")


def _other_numbers(constant: Constant, where: tuple[int, ...]) -> Iterator[float]:
    number = constant.array[where]
    if constant.dtype == ir.DataType.BOOL:
        yield not number
    elif constant.dtype.is_floating_point():
        yield 2 * float(number) + 1
    else:
        least, most = int(constant.dtype.min), int(constant.dtype.max)
        yield from (n for n in (int(number) + 1, int(number) - 1) if least <= n <= most)


def _elements(array: Array) -> Iterator[tuple[int, ...]]:
    """Every place of a small array; the first, a middle and the last of a larger one."""
    flat = range(array.size) if array.size <= _FEW else (0, array.size // 2, array.size - 1)
    for index in flat:
        yield tuple(int(i) for i in np.unravel_index(index, array.shape))


def _with(array: Array, where: tuple[int, ...], number: float) -> Array:
    changed = np.array(array)
    changed[where] = number
    return changed


def _lists(bodies: Bodies) -> Iterator[Constant]:
    return (c for c in bodies.constants if c.array.ndim == 1 and c.dtype.is_integer() and c.array.size <= _FEW)


def _label(constant: Constant) -> str:
    return f"constant '{constant.name}'"


def _put(constant: Constant, array: Array, what: str) -> Place:
    return Place(f"{_label(constant)}: {what}", partial(constant.put, array))


def _narrow(constant: Constant, dtype: ir.DataType) -> None:
    array = np.clip(constant.array, int(ir.DataType.INT32.min), int(ir.DataType.INT32.max))
    constant.put(array.astype(dtype.numpy()), dtype)


def _cast(bodies: Bodies, constant: Constant, stored: ir.DataType) -> None:
    uses = list(constant.value.uses())
    cast = bodies.read(constant.value, "Cast", to=constant.dtype.value)
    for node, index in uses:
        node.replace_input_with(index, cast)
    constant.put(constant.array.astype(stored.numpy()), stored)


def _own(
    bodies: Bodies, constant: Constant, node: ir.Node, index: int, other: tuple[tuple[int, ...], float] | None = None
) -> None:
    copy = bodies.copy(constant)
    if other is not None:
        copy.put(_with(constant.array, *other))
    node.replace_input_with(index, copy.value)
