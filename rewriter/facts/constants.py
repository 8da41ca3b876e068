"""Constants and what operators with constant operands make of them: views of what is stored, and small integers.

A view is exact or is not stated: indices are normalised, 0 and -1 resolved; what would round, repeat elements or depend
on an input is no view.
Facts stated: ``rewriter.tensors.View``, ``Views`` (a sequence of them).
Source: the operators' specification; integer arithmetic from exports that were not optimized, as Slice bounds from
Concat or Add, Cast(Reshape(Identity(Constant))), Shape(w).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import reference

from rewriter.facts.facts import Facts
from rewriter.facts.family import Family
from rewriter.facts.integers import static
from rewriter.facts.moves import (
    OPERATORS,
    Cut,
    Drop,
    Insert,
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
from rewriter.facts.size import Size
from rewriter.graph.attributes import cast_type, integer_attribute
from rewriter.graph.contents import serialized
from rewriter.graph.declines import CONSTANT, FOLDED, Declined
from rewriter.tensors import View

_LARGEST = 256
"""Elements of the largest result that is computed."""

constants = Family("constants")


@dataclass(frozen=True)
class Views:
    """The pieces of a sequence that SplitToSequence made."""

    items: tuple[View, ...]


@constants.at(*OPERATORS)
def moved(facts: Facts, node: ir.Node, stack: ir.Value, *operands: ir.Value | None) -> Mapping[ir.Value, object] | None:
    """What a movement operator shows of a constant."""
    view = _view(facts, stack, node)
    if view is None:
        return None
    try:
        found = read(facts, node, list(map(Size.of, view.shape)))
        return {value: _shown_parts(view, moves, node) for value, moves in found.items()}
    except (IndexError, ValueError, ZeroDivisionError) as error:  # no runtime computes this either
        raise Declined(f"its operands do not fit a constant of shape {list(view.shape)}", node) from error


def _view(facts: Facts, value: ir.Value, node: ir.Node) -> View | None:
    """Returns the view that a value is; declines with the value's own reason where it is almost one."""
    view = facts.get(value, View)
    if view is None and facts.why_not(value):
        raise Declined(facts.why_not(value), node)
    return view


def _shown_parts(view: View, moves: Moves | Parts, node: ir.Node) -> View | Views:
    if isinstance(moves, Parts):
        return Views(tuple(_shown(view, part, node) for part in moves.items))
    return _shown(view, moves, node)


def _shown(view: View, moves: Moves, node: ir.Node) -> View:
    """Applies the moves to a view."""
    for move in moves:
        match move:
            case Permute(order):
                view = view.transpose(order)
            case Cut(axis, start, count, step):
                view = view.slice(axis, start, count, step)
            case Take(axis, position):
                view = view.index(axis, position)
            case Insert(axes):
                view = view.reshape(inserted(view.shape, axes, 1))
            case Drop(axes):
                for axis in reversed(axes):
                    view = view.index(axis, 0)
            case Regroup(sizes):
                view = view.reshape([size.factor for size in sizes])
            case Select():
                raise Declined("the indices do not step evenly", node)
            case Repeat():
                raise Declined("it repeats the constant", node)
    return view


@constants.at("SequenceAt")
def part(facts: Facts, node: ir.Node, sequence: ir.Value, position: ir.Value) -> View | None:
    """One piece of a sequence of views."""
    views = facts.get(sequence, Views)
    if views is None:
        return None
    where = static(facts, node, 1)
    if where is None or len(where) != 1:
        raise Declined("the position depends on an input", node, remedy=CONSTANT)
    return views.items[where[0]] if -len(views.items) <= where[0] < len(views.items) else None


@constants.at("Cast")
def cast(facts: Facts, node: ir.Node, x: ir.Value) -> View | None:
    """A cast that keeps every value: a widening one, or one of small integers."""
    view, to = _view(facts, x, node), cast_type(node)
    if view is None or to is None:
        return None
    numbers = _small_integers(facts, x)
    if numbers is not None and not to.is_floating_point() and to != ir.DataType.STRING:
        return _whole(numbers.astype(to.numpy()), node.outputs[0])
    shown = view.cast(to)
    if shown is None and view.dtype.is_floating_point():
        raise Declined(f"the cast from {view.dtype.name} to {to.name} rounds", node)
    return shown


@constants.at("Add", "Sub", "Mul", "Div", "Mod", "Neg", "Concat", "Range", "Min", "Max", "Where", "Equal")
def computed(facts: Facts, node: ir.Node, *inputs: ir.Value | None) -> View | None:
    """An operator whose inputs are all small constant integers, evaluated by ONNX's own reference."""
    views: list[View] = []
    for value in inputs:
        view = facts.get(value, View)
        if view is None:
            return None
        views.append(view)
    arrays = [array for value in inputs if (array := _small_integers(facts, value)) is not None]
    if len(arrays) != len(inputs):
        if any(view.size > _LARGEST and view.dtype.is_floating_point() for view in views):
            raise Declined(f"{node.op_type} computes it from constants", node, remedy=FOLDED)
        return None
    try:
        return _whole(_evaluate(node, arrays), node.outputs[0])
    except Exception as refused:  # the reference evaluator raises whatever NumPy does
        raise Declined(f"its operands do not fit: {refused}", node) from refused


@constants.at("ConstantOfShape")
def filled(facts: Facts, node: ir.Node, shape: ir.Value) -> View | None:
    """One integer in a small constant shape."""
    view, value = facts.get(shape, View), node.attributes.get("value")
    if view is None or value is None or view.size > _LARGEST or not value.as_tensor().dtype.is_integer():
        return None
    extents = view.numpy().reshape(-1).tolist()
    if min(extents, default=1) < 0 or math.prod(extents) > _LARGEST:
        return None
    return _whole(np.full(extents, value.as_tensor().numpy().reshape(-1)[0]), node.outputs[0])


@constants.at("Shape")
def shape(facts: Facts, node: ir.Node, constant: ir.Value) -> View | None:
    """The shape of a constant, or a run of its dimensions."""
    view = facts.get(constant, View)
    if view is None:
        return None
    start = integer_attribute(node, "start", 0)
    end = integer_attribute(node, "end", view.rank)
    return _whole(np.array(view.shape[start:end], dtype=np.int64), node.outputs[0])


def _small_integers(facts: Facts, value: ir.Value | None) -> Any:
    view = facts.get(value, View)
    if view is None or view.size > _LARGEST or view.dtype.is_floating_point() or view.dtype == ir.DataType.STRING:
        return None
    return np.asarray(view.numpy())


def _whole(array: Any, out: ir.Value) -> View:
    return View.whole(ir.tensor(np.asarray(array), name=out.name), out.name or "")


def _evaluate(node: ir.Node, arrays: list[Any]) -> Any:
    names = [f"x{i}" for i in range(len(arrays))]
    attributes = [serialized(a) for a in node.attributes.values()]
    proto = onnx.helper.make_node(node.op_type, names, ["y"])
    proto.attribute.extend(attributes)
    graph = onnx.helper.make_graph(
        [proto],
        "operand",
        [
            onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in zip(names, arrays, strict=True)
        ],
        [onnx.ValueInfoProto(name="y")],
    )
    version = node.graph.opset_imports.get("", 21) if node.graph is not None else 21
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", version)])
    (result,) = reference.ReferenceEvaluator(model).run(None, dict(zip(names, arrays, strict=True)))
    return result
