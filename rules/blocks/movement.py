"""Movement operators: the same content on other axes, or a part of it; and the same for vectors of sizes.

Facts stated: ``Located`` (of whatever content the input has), ``Integers``, ``Pieces``.
Source: every exporter; what an operator does is read by ``rewriter.facts.moves``, for constants too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

import onnx_ir as ir

from rewriter.facts import Facts, Family
from rewriter.facts.integers import static
from rewriter.facts.moves import (
    OPERATORS,
    Cut,
    Drop,
    Insert,
    Move,
    Moves,
    Parts,
    Permute,
    Regroup,
    Repeat,
    Select,
    Take,
    inserted,
    read,
)
from rewriter.facts.shapes import shape_of
from rewriter.facts.size import ONE, Dims, Integers, Size
from rewriter.rule import Declined
from rewriter.rules.blocks.activations import as_features
from rewriter.rules.blocks.axes import Atom, Dim, Located, Pieces, feature, put, reshape, total
from rewriter.rules.blocks.contents import Tokens
from rewriter.rules.blocks.token_axes import token_axes
from rewriter.tensors import View

movement = Family("movement")
_T = TypeVar("_T", Located, Integers)
_ROOTS = frozenset({"Identity", "Unsqueeze", "Reshape", "Expand", "Tile", "Transpose"})
"""Operators at which a value that has no content yet may be tokens."""


def token_rows(facts: Facts, value: ir.Value, features: int | None = None) -> Located | None:
    """Returns ``value`` as the tokens that it is where it is nothing else: [.., H] with H features.

    Args:
        facts: what is known.
        value: a float value of rank 2 or more.
        features: H, where the model does not say.
    """
    if value.dtype is not None and not value.dtype.is_floating_point():
        return None
    dims = shape_of(facts, value)
    if dims is None or len(dims) < 2:
        return None
    last = dims[-1].constant if dims[-1].constant is not None else features
    lead = token_axes(facts, value)
    if last is None or lead is None or features not in (None, last):
        return None
    return Located(Tokens(value), (*lead, feature(last)))


@movement.at(*OPERATORS)
def moved(facts: Facts, node: ir.Node, data: ir.Value, *operands: ir.Value | None) -> Mapping[ir.Value, object] | None:
    """What a movement operator makes of a content, or of sizes; constants have facts of their own."""
    if facts.get(data, View) is not None:
        return None
    integers = facts.get(data, Integers)
    known = facts.get(data, Located)
    held = known or (token_rows(facts, data) if node.op_type in _ROOTS else None)
    try:
        if integers is not None:
            found = read(facts, node, () if integers.scalar else (Size(len(integers.sizes)),))
            return _each(found, integers, _integers_moved)
        if held is None:
            return None
        found = read(facts, node, held.dims)
        if known is None and node.op_type in ("Reshape", "Transpose"):  # tokens are what they are, in no other shape
            found = {value: moves for value, moves in found.items() if _leaves_tokens(held.dims, moves)}
        return _each(found, held, _located_moved)
    except (Declined, IndexError, ValueError, ZeroDivisionError):  # an operand depends on an input, or does not fit
        return None


def _leaves_tokens(dims: Dims, moves: Moves | Parts) -> bool:
    """Whether a reshape or transposition does nothing but add dimensions of one position."""
    match moves:
        case (Regroup(sizes),) if len(sizes) > len(dims):
            return [size for size in sizes if size != ONE] == [size for size in dims if size != ONE]
        case (Regroup(sizes),):
            return sizes == dims
        case (Permute(order),):
            return order == tuple(range(len(dims)))
    return False


def _each(
    found: Mapping[ir.Value, Moves | Parts], held: _T, by: Callable[[_T, Move], _T | None]
) -> dict[ir.Value, object]:
    """What the moves of each output make of a fact."""
    stated: dict[ir.Value, object] = {}
    for value, moves in found.items():
        if not isinstance(moves, Parts):
            part = _all(held, moves, by)
            if part is not None:
                stated[value] = part
            continue
        pieces: list[object] = [_all(held, some, by) for some in moves.items]
        items = tuple(piece for piece in pieces if isinstance(piece, Located))
        if len(items) == len(pieces):
            stated[value] = Pieces(items)
    return stated


def _all(held: _T, moves: Moves, by: Callable[[_T, Move], _T | None]) -> _T | None:
    """What moves make of a fact, one after the other; None where one of them makes nothing that has a name."""
    found: _T | None = held
    for move in moves:
        found = None if found is None else by(found, move)
    return found


def _located_moved(data: Located, move: Move) -> Located | None:
    """A content on the axes that a move leaves it."""
    match move:
        case Permute(order):
            return replace(data, axes=tuple(data.axes[p] for p in order))
        case Cut(axis, start, count, step):
            return _cut(data, axis, start, count, step) if step > 0 else None
        case Take(axis, position):
            taken = _pick(data, axis, position)
            return None if taken is None or taken.axes[axis] else replace(taken, axes=put(taken.axes, axis))
        case Insert(axes):
            return replace(data, axes=inserted(data.axes, axes, ()))
        case Drop(axes):
            for axis in reversed(axes):
                picked = _pick(data, axis, 0)
                if picked is None:
                    return None
                data = replace(picked, axes=put(picked.axes, axis))
            return data
        case Regroup(sizes):
            grouped = reshape(data.axes, sizes)
            return None if grouped is None else Located(data.content, grouped)
        case Repeat(counts, tiled=True):
            pairs = zip(counts, data.axes, strict=True)
            return replace(data, axes=tuple((Atom("repeat", n), *dim) if n != ONE else dim for n, dim in pairs))
        case Repeat(sizes):
            return _expanded(data, sizes)
        case Select():
            return None


def _cut(data: Located, axis: int, start: int, count: int, step: int) -> Located | None:
    """Evenly stepping positions along one dimension, which stays; one position fixes its index."""
    dim = data.axes[axis]
    if (start, count, step) == (0, total(dim).constant, 1):
        return data
    if count == 1:
        return _pick(data, axis, start)
    if len(dim) != 1:
        return None
    part = (as_features(data.content) or data.content).part(dim[0], start, count, step)
    atom = Atom(dim[0].kind, Size.of(count), dim[0].index)
    return None if part is None else Located(part, put(data.axes, axis, (atom,)))


def _pick(data: Located, axis: int, position: int) -> Located | None:
    """One position along a dimension, which stays with extent 1."""
    dim = data.axes[axis]
    if not dim:
        return data
    if dim[0].kind in ("outer", "inner"):
        return _part_of_features(data, axis, position)
    fixed = data.content.fix(dim[0], position) if len(dim) == 1 else None
    return None if fixed is None else Located(fixed, put(data.axes, axis, ()))


def _part_of_features(data: Located, axis: int, position: int) -> Located | None:
    """One position along one of the two indices that features were cut into: evenly stepping features."""
    found = {dim[0].kind: (at, dim[0].size.constant or 0) for at, dim in enumerate(data.axes) if len(dim) == 1}
    if "outer" not in found or "inner" not in found:
        return None
    (outer_at, outer), (inner_at, inner) = found["outer"], found["inner"]
    first = axis == outer_at
    start, count, step = (position * inner, inner, 1) if first else (position, outer, inner)
    whole = Atom("feature", Size(outer * inner))
    part = (as_features(data.content) or data.content).part(whole, start, count, step)
    axes = put(put(data.axes, axis, ()), inner_at if first else outer_at, feature(count))
    return None if part is None else Located(part, axes)


def _expanded(data: Located, sizes: Dims) -> Located | None:
    lacking = len(sizes) - data.rank
    axes: list[Dim] = [()] * lacking + list(data.axes)
    for position, size in enumerate((ONE,) * -lacking + sizes):
        if size in (ONE, total(axes[position])):
            continue
        if axes[position]:
            return None
        axes[position] = (Atom("repeat", size),)
    return replace(data, axes=tuple(axes))


def _integers_moved(held: Integers, move: Move) -> Integers | None:
    """What a move makes of a scalar or a vector of sizes."""
    match move:
        case Cut(_, start, count, step):
            return Integers(tuple(held.sizes[start + i * step] for i in range(count)))
        case Select(_, positions):
            return Integers(tuple(held.sizes[position] for position in positions))
        case Take(_, position):
            return Integers((held.sizes[position],), scalar=True)
        case Insert((0,)) if held.scalar:
            return replace(held, scalar=False)
        case Drop((0,)):
            return replace(held, scalar=True)
        case Regroup((size,)) if size.constant == len(held.sizes):
            return replace(held, scalar=False)
    return None


@movement.at("SequenceAt")
def part(facts: Facts, node: ir.Node, sequence: ir.Value, position: ir.Value) -> Located | None:
    """One part of a sequence."""
    pieces, where = facts.get(sequence, Pieces), static(facts, node, 1)
    if pieces is None or where is None or not -len(pieces.items) <= where[0] < len(pieces.items):
        return None
    return pieces.items[where[0]]
