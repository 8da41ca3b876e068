"""Who reads a constant, directly or through movement operators that only show parts of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import onnx_ir as ir

from rewriter.facts import Facts
from rewriter.facts.constants import Views
from rewriter.facts.moves import Drop, Insert, Parts, Permute, inserted, read
from rewriter.facts.shapes import shape_of
from rewriter.graph.attributes import integer_attribute
from rewriter.graph.declines import Declined, stays_float
from rewriter.graph.walk import producers, walk
from rewriter.tensors import View

Place = tuple[ir.Value, tuple[int, ...]]
"""A value, and which axis of the one that a walk began with each of its axes is."""


class Use(NamedTuple):
    """A node that reads a value, and at which input."""

    node: ir.Node
    idx: int


def origin(facts: Facts, value: ir.Value) -> ir.Value:
    """Returns the constant that a chain of movement operators, which ends in ``value``, begins with."""
    *_, first = walk([value], lambda at: [v for v in producers(at)[:1] if is_shown(facts, v)], limit=None)
    return first


def readers(facts: Facts, value: ir.Value) -> Iterator[Use]:
    """Yields every use of the constant behind ``value``, or of a view of it, that is not itself a view of it.

    Raises:
        Declined: the constant, or a view of it, is a graph output.
    """

    def shown(at: ir.Value) -> list[ir.Value]:
        return [out for use in at.uses() if _is_view(facts, Use(*use)) for out in use.node.outputs]

    for view in walk([origin(facts, value)], shown, limit=None):
        if view.is_graph_output():
            raise stays_float(view)
        yield from (use for found in view.uses() if not _is_view(facts, use := Use(*found)))


def is_shown(facts: Facts, value: ir.Value) -> bool:
    """Whether a value is a view of a constant, or a sequence of them."""
    return facts.get(value, View) is not None or facts.get(value, Views) is not None


def is_whole(facts: Facts, value: ir.Value) -> bool:
    """Whether a value is all of a constant, moved about or widened: nothing of that stays where it is quantized."""
    view, stored = facts.get(value, View), facts.get(origin(facts, value), View)
    return view is not None and stored is not None and view.size == stored.size


def _is_view(facts: Facts, use: Use) -> bool:
    """Whether the use only shows what it reads."""
    return use.idx == 0 and use.node.op_type != "Shape" and any(is_shown(facts, out) for out in use.node.outputs)


def require_one_reader(facts: Facts, weight: ir.Value, node: ir.Node) -> None:
    """Declines where the weight would stay in the model beside what replaces it."""
    for use in readers(facts, weight):
        if use.node is not node:
            raise stays_float(use.node)


def reads_rows(use: Use) -> bool:
    """True where the node looks up rows by an index: a Gather along the first axis, or a GatherND."""
    if use.idx != 0 or use.node.domain not in ("", "ai.onnx"):
        return False
    return use.node.op_type == "GatherND" or (use.node.op_type == "Gather" and gathers_rows(use.node))


def gathers_rows(node: ir.Node) -> bool:
    """True where a Gather picks along the first axis."""
    axis = integer_attribute(node, "axis", 0)
    table = node.inputs[0]
    return axis == 0 or (table is not None and table.shape is not None and axis == -table.shape.rank())


def contracted_axis(facts: Facts, value: ir.Value, rank: int) -> int:
    """Returns which of the last two axes of ``value`` a matrix product sums over: -1 or -2; -1 where nothing tells."""

    def behind(place: Place) -> list[Place]:
        value, axes = place
        moved = [(use.node.outputs[0], _moved(facts, value, Use(*use), axes)) for use in value.uses()]
        return [(out, axes) for out, axes in moved if axes is not None]

    for shown, axes in walk([(value, tuple(range(-rank, 0)))], behind, limit=None):
        for use in shown.uses():
            summed = _summed(Use(*use), axes)
            if summed is not None:
                return summed if summed in (-1, -2) else -1
    return -1


def _summed(use: Use, axes: Sequence[int]) -> int | None:
    """The axis that the use sums over, or None where it is no product of matrices."""
    node = use.node
    if len(axes) < 2 or use.idx > 1 or node.op_type not in ("MatMul", "Gemm"):
        return None
    transposed = node.op_type == "Gemm" and integer_attribute(node, "transB" if use.idx else "transA", 0)
    return axes[-2] if (use.idx == 1) != bool(transposed) else axes[-1]


def _moved(facts: Facts, value: ir.Value, use: Use, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """Where the axes of ``value`` lie behind a movement operator, 0 for a new one; None behind another operator."""
    if use.idx:
        return None
    if use.node.op_type == "Cast":
        return axes
    dims = shape_of(facts, value)
    try:
        moves = None if dims is None else read(facts, use.node, dims).get(use.node.outputs[0])
    except (Declined, IndexError, ValueError, ZeroDivisionError):
        return None
    if moves is None or isinstance(moves, Parts):
        return None
    for move in moves:
        match move:
            case Permute(order):
                axes = tuple(axes[p] for p in order)
            case Insert(new):
                axes = inserted(axes, new, 0)
            case Drop(gone):
                axes = tuple(axis for i, axis in enumerate(axes) if i not in gone)
            case _:
                return None
    return axes
