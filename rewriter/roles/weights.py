"""Constants as roles see them: which expert's slice of which stack a weight is.

What movement operators do is read in ``facts.moves``. Roles ask less of a constant than those who write it anew: one
that was dequantized, rounded or computed is a weight of its stack still.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from rewriter.facts import Facts
from rewriter.facts.integers import integers_of
from rewriter.facts.moves import Cut, Moves, Parts, Take, moved, read
from rewriter.facts.size import Dims, Size
from rewriter.graph.declines import Declined
from rewriter.roles.facts import Constant
from rewriter.tensors import View

_FAR = 2**62
"""An extent that is not known: a position counted from the front lies before it, one from the back does not."""
_RANK = 8
"""More dimensions than the value has whose shape is not known."""


def stored(facts: Facts, value: ir.Value) -> Constant:
    """Returns an initializer, or what a Constant node holds: all of it."""
    view = facts.get(value, View)
    shape = _static_shape(value) if view is None else view.shape
    return Constant(value, shape, len(shape or ()))


def computed(constants: Sequence[Constant], node: ir.Node) -> Constant:
    """Returns a constant computed from several: the one of highest rank tells what it is."""
    widest = max(constants, key=lambda constant: constant.rank)
    return widest._replace(shape=_static_shape(node.outputs[0]))


def single(facts: Facts, value: ir.Value | None) -> int | None:
    """Returns the one number, not below 0, that a constant holds; None for any other value."""
    try:
        held = integers_of(facts, value)
    except Exception:  # a tensor may be any code or any file; one that cannot be read tells nothing
        return None
    number = held.sizes[0].constant if held is not None and len(held.sizes) == 1 else None
    return number if number is not None and number >= 0 else None


def parts(facts: Facts, node: ir.Node, constant: Constant) -> list[Constant]:
    """Returns what an operator that moves elements, or picks some, makes of a constant, for each output."""
    views = [facts.get(output, View) for output in node.outputs]
    if (constant.rank < 3 or constant.expert is not None) and None not in views:  # no more is to be learned from moves
        return [Constant(constant.root, view.shape, view.rank, *constant[3:]) for view in views if view is not None]
    dims = tuple(map(Size.of, constant.shape or [_FAR] * constant.rank))
    moves = _moves(facts, node, dims)
    return [_part(constant, dims, moves.get(output), output) for output in node.outputs]


def columns(facts: Facts, node: ir.Node) -> list[int]:
    """Returns the one position that each output holds of the operator's first input; empty where one holds several."""
    value = node.inputs[0]
    shape = None if value is None else value.shape
    dims = (None,) * _RANK if shape is None else shape.dims
    moves = _moves(facts, node, tuple(Size(dim if isinstance(dim, int) else _FAR) for dim in dims))
    found = [_position(moves.get(output)) for output in node.outputs]
    return [] if None in found else [position for position in found if position is not None]


def _moves(facts: Facts, node: ir.Node, dims: Dims) -> Mapping[ir.Value, Moves | Parts]:
    try:
        return read(facts, node, dims)
    except (Declined, ArithmeticError, LookupError, TypeError, ValueError, OSError):
        return {}


def _part(constant: Constant, dims: Dims, moves: Moves | Parts | None, output: ir.Value) -> Constant:
    shape = _static_shape(output)
    if not isinstance(moves, tuple):
        rank = constant.rank if output.shape is None else len(output.shape)
        return constant._replace(shape=shape, rank=rank)
    sizes = moved(dims, moves)
    if shape is None and all(size.factor < _FAR for size in sizes):
        shape = tuple(size.factor for size in sizes)
    expert = constant.expert
    if expert is None and constant.rank >= 3:
        expert = _position(moves, axis=0)
    return Constant(constant.root, shape, len(sizes), expert, constant.gathers, constant.route)


def _position(moves: Moves | Parts | None, axis: int | None = None) -> int | None:
    """The position along an axis (by default any) that is kept alone."""
    for move in moves if isinstance(moves, tuple) else ():
        match move:
            case Take(at, position) | Cut(at, position, 1) if axis in (at, None) and position < _FAR // 2:
                return position
    return None


def _static_shape(value: ir.Value) -> tuple[int, ...] | None:
    dims = () if value.shape is None else tuple(dim for dim in value.shape.dims if isinstance(dim, int))
    return dims if value.shape is not None and len(dims) == len(value.shape) else None
