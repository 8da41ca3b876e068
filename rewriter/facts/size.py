"""Sizes: products of integers and unknown dimensions, and what operators on integers make of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

Symbol = str | tuple[ir.Value, int]
"""A dimension that is not known: its name in the model, or an axis of a value."""


_LARGEST = (1 << 63) - 1
"""Of the integers that ONNX computes with; beyond, its own wrap around."""

_UNKNOWNS = 16
"""Unknown dimensions in a product that are kept: no tensor has as many, and a product may be squared at every node."""


@dataclass(frozen=True)
class Size:
    """A product of an integer and of unknown dimensions."""

    factor: int = 1
    symbols: tuple[Symbol, ...] = ()

    @staticmethod
    @functools.cache
    def of(extent: int) -> Size:
        """Returns a known extent; cached, since few different ones are asked for at every node."""
        return Size(extent)

    def __mul__(self, other: Size) -> Size:
        return Size(self.factor * other.factor, tuple(sorted((*self.symbols, *other.symbols), key=_order)))

    def __floordiv__(self, other: Size) -> Size | None:
        """The exact quotient, or None where it is not known to be one."""
        if not other.factor or self.factor % other.factor:
            return None
        left = list(self.symbols)
        for symbol in other.symbols:
            if symbol not in left:
                return None
            left.remove(symbol)
        return Size(self.factor // other.factor, tuple(left))

    @property
    def constant(self) -> int | None:
        """The integer, where nothing is unknown."""
        return None if self.symbols else self.factor


def _order(symbol: Symbol) -> tuple[int, str, int]:
    return (0, symbol, 0) if isinstance(symbol, str) else (id(symbol[0]), "", symbol[1])


ONE = Size()

Dims = tuple[Size, ...]


@dataclass(frozen=True)
class Integers:
    """A scalar or a vector of sizes.

    Attributes:
        sizes: one for each element.
        scalar: whether it has rank 0.
    """

    sizes: Dims
    scalar: bool = False


def reshaped(dims: Dims | None, target: Sequence[Size], *, keep_zeros: bool) -> Dims | None:
    """Returns the extents after a Reshape to ``target``, with 0 and -1 as the operator means them.

    Where ``dims`` is unknown, the target tells all but an extent of -1.
    """
    wanted: list[Size | None] = [None if size.constant == -1 else size for size in target]
    if wanted.count(None) > 1 or any(size is not None and size.factor < 0 for size in wanted):
        return None
    if keep_zeros:
        zeros = [i for i, size in enumerate(wanted) if size is not None and size.constant == 0]
        if zeros and (dims is None or zeros[-1] >= len(dims)):
            return None
        for i in zeros:
            wanted[i] = dims[i] if dims is not None else None
    if None not in wanted:
        return tuple(size for size in wanted if size is not None)
    if dims is None:
        return None
    rest: Size | None = total_of(dims)
    for size in wanted:
        rest = rest // size if rest is not None and size is not None else rest
    return None if rest is None else tuple(rest if size is None else size for size in wanted)


def total_of(dims: Sequence[Size]) -> Size:
    """Returns the number of elements."""
    size = ONE
    for dim in dims:
        size *= dim
    return size


def arithmetic(op_type: str, a: Integers | None, b: Integers | None) -> Integers | None:
    """Returns the elementwise result of an operator on sizes, or None where it is not known."""
    if a is None or b is None:
        return None
    count = max(len(a.sizes), len(b.sizes))
    if {len(a.sizes), len(b.sizes)} - {1, count}:
        return None
    pairs = zip(a.sizes * (count // len(a.sizes)), b.sizes * (count // len(b.sizes)), strict=True)
    sizes = [_calculate(op_type, x, y) for x, y in pairs]
    return None if None in sizes else Integers(tuple(s for s in sizes if s is not None), a.scalar and b.scalar)


def _calculate(op_type: str, x: Size, y: Size) -> Size | None:
    found = _exact(op_type, x, y)
    return None if found is None or abs(found.factor) > _LARGEST or len(found.symbols) > _UNKNOWNS else found


def _exact(op_type: str, x: Size, y: Size) -> Size | None:
    if op_type == "Mul":
        return x * y
    if x.constant is None or y.constant is None:
        return x // y if op_type == "Div" else None
    if op_type == "Div":
        return None if not y.constant else Size(math.trunc(x.constant / y.constant))
    return Size(x.constant + y.constant if op_type == "Add" else x.constant - y.constant)
