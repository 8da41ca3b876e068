"""Grouped rows: (token, slot) pairs sorted by expert, one matrix product for each expert's rows, and the way back.

Facts stated: ``Located`` with a content of ``recognise.rows``; gathered and concatenated rows keep their content, on a
``row`` or ``group`` index.
Source: transformers' grouped_mm as torch.onnx writes it: sort, histogram, cumulated ends, a Range for each expert.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from rewriter.facts import Facts, Family
from rewriter.facts.integers import integers_of
from rewriter.facts.shapes import shape_of
from rewriter.facts.size import Size
from rewriter.graph.attributes import cast_type, float_attribute, integer_attribute, text_attribute
from rewriter.rule import Declined
from rewriter.rules.blocks.activations import number_of
from rewriter.rules.blocks.axes import Atom, Axes, Content, Located, Uniform, only, put, tokens, total, unify
from rewriter.rules.blocks.contents import Output
from rewriter.rules.blocks.counted import group_of, require_whole_numbers
from rewriter.rules.blocks.guards import FLOATS
from rewriter.rules.blocks.joined import joined, router_of
from rewriter.rules.blocks.laws import of_two
from rewriter.rules.blocks.mixing import Chosen, Complete, Mixed, Weighted
from rewriter.rules.blocks.rows import (
    Arange,
    Count,
    Counts,
    End,
    Group,
    Inverse,
    NotNegative,
    Order,
    RowSlot,
    RowToken,
    Sorted,
    row,
)
from rewriter.rules.blocks.uniform import seeded, uniform_of
from rewriter.tensors import View

rows = Family("rows")


@rows.at("TopK")
def sort(facts: Facts, node: ir.Node, chosen: ir.Value, k: ir.Value) -> dict[ir.Value, object] | None:
    """``TopK(chosen, as many as there are, smallest first)``."""
    values, indices = node.outputs
    located, count = facts.get(chosen, Located), integers_of(facts, k)
    if located is None or not isinstance(located.content, Chosen) or located.rank != 1:
        return None
    held, pairs = located.content, located.axes[0]
    whole = count is not None and count.sizes == (total(pairs),) and held.slot is None
    if not whole or integer_attribute(node, "largest", 1) or not integer_attribute(node, "sorted", 1):
        return None
    if not pairs or pairs[-1].kind != "slot":
        return None
    rows: Axes = ((row(held.router, pairs),),)
    numbers = tuple(float(e) for e in range(held.router.experts))
    return {
        values: Located(Sorted(held.router, numbers), rows),
        indices: Located(Order(held.router, pairs), rows),
    }


@rows.at("TopK")
def sort_back(facts: Facts, node: ir.Node, order: ir.Value, k: ir.Value) -> dict[ir.Value, object] | None:
    """``argsort(order)``: which row each pair is."""
    located, count = facts.get(order, Located), integers_of(facts, k)
    if located is None or not isinstance(located.content, Order) or located.rank != 1 or count is None:
        return None
    held = located.content
    if count.sizes != (total(held.pairs),) or integer_attribute(node, "largest", 1):
        return None
    if not integer_attribute(node, "sorted", 1):
        return None
    return {node.outputs[1]: Located(Inverse(held.router, held.pairs), (held.pairs,))}


@rows.at("Less", "GreaterOrEqual", "Mod", "Div")
def row_arithmetic(facts: Facts, node: ir.Node, a: ir.Value, b: ir.Value) -> Located | None:
    """Integer arithmetic on rows: token and slot of a pair; a function of the expert; what is the same for all."""
    located, number = facts.get(a, Located), number_of(facts, b)
    if located is None or number is None:
        return None
    wide = a.dtype is not None and a.dtype.is_floating_point()
    held = _calculated(node.op_type, located.content, number, facts.get(b, View))
    if isinstance(held, RowToken) and wide:
        held = dataclasses.replace(held, exact=False)
    return None if held is None else Located(held, located.axes)


def _calculated(op_type: str, held: Content, number: float, view: View | None) -> Content | None:
    if isinstance(held, Order):
        k = held.router.k
        if op_type == "Less":
            return Uniform(0.0) if number <= 0 else None
        if op_type == "GreaterOrEqual":
            return Uniform(1.0) if number <= 0 else None
        if number == k and op_type == "Mod":
            return RowSlot(held.router)
        return RowToken(held.router, held.pairs[:-1]) if number == k and op_type == "Div" else None
    if isinstance(held, Sorted) and op_type == "Div" and view is not None and number:
        dtype = view.dtype.numpy()
        values = np.array(held.values, dtype) / np.array(number, dtype)
        return Sorted(held.router, tuple(float(v) for v in values))
    return None


@rows.at("And", "Equal", "Xor")
def row_logic(facts: Facts, node: ir.Node, a: ir.Value, b: ir.Value) -> Located | None:
    """What is false for all rows, or the same for all."""
    first, second = facts.get(a, Located), facts.get(b, Located)
    numbers = uniform_of(facts, a), uniform_of(facts, b)
    located = first or second
    if located is None:
        return None
    axes = located.axes if first is None or second is None else unify(first.axes, second.axes)
    others = [shape_of(facts, value) for value in (a, b) if facts.get(value, Located) is None]
    if axes is None or any(dims not in ((), located.dims) for dims in others):
        return None
    if node.op_type == "And" and 0.0 in numbers:
        return Located(Uniform(0.0), axes)
    if node.op_type != "And" and numbers[0] is not None and numbers[1] is not None:
        return Located(Uniform(float((numbers[0] == numbers[1]) == (node.op_type == "Equal"))), axes)
    return None


@rows.at("Cast", "CastLike")
def row_cast(facts: Facts, node: ir.Node, x: ir.Value, *like: ir.Value | None) -> Located | None:
    """A cast of sorted experts, counts or slots; of experts, what it makes of each."""
    located = facts.get(x, Located)
    if located is None:
        return None
    held, to = located.content, like[0].dtype if like and like[0] is not None else cast_type(node)
    if isinstance(held, RowSlot):
        return located
    if isinstance(held, Counts | Count | Order | RowToken):
        require_whole_numbers(to, node)
        return located
    if (
        not isinstance(held, Sorted)
        or to is None
        or to not in (*FLOATS, ir.DataType.DOUBLE, ir.DataType.INT32, ir.DataType.INT64)
    ):
        return None
    values = np.array(held.values).astype(to.numpy())
    return dataclasses.replace(located, content=Sorted(held.router, tuple(float(v) for v in values)))


@rows.at("Floor", "Abs", "Sign")
def rounded_down(facts: Facts, node: ir.Node, x: ir.Value) -> Located | None:
    """Steps of a division of rows in floats that is rounded towards zero."""
    located = facts.get(x, Located)
    if located is None or not isinstance(located.content, RowToken):
        return None
    if node.op_type == "Sign":
        return dataclasses.replace(located, content=NotNegative())
    return located if node.op_type == "Abs" else dataclasses.replace(located, content=exactly(located.content))


def exactly(held: RowToken) -> RowToken:
    """Returns tokens' numbers, rounded down."""
    return dataclasses.replace(held, exact=True)


@of_two.at("Mul")
def with_sign(a: Located, b: Located, node: ir.Node) -> Content | None:
    """Returns numbers that are not negative times their sign."""
    return a.content if isinstance(a.content, RowToken) and isinstance(b.content, NotNegative) else None


@rows.at("Clip")
def row_clip(facts: Facts, node: ir.Node, x: ir.Value, *others: ir.Value | None) -> Located | None:
    """Bounds of sorted experts."""
    located = facts.get(x, Located)
    if located is None or not isinstance(located.content, Sorted):
        return None
    low = number_of(facts, node.inputs[1]) if len(node.inputs) > 1 else None
    high = number_of(facts, node.inputs[2]) if len(node.inputs) > 2 else None
    given = sum(value is not None for value in node.inputs[1:])
    if given != (low is not None) + (high is not None) or float_attribute(node, "min", 0.0):
        return None
    values = np.clip(located.content.values, -np.inf if low is None else low, np.inf if high is None else high)
    return dataclasses.replace(
        located, content=dataclasses.replace(located.content, values=tuple(float(v) for v in values))
    )


@rows.at("Range")
def row_numbers(facts: Facts, node: ir.Node, start: ir.Value, end: ir.Value, step: ir.Value) -> Located | None:
    """The numbers of an expert's rows, or all numbers from 0."""
    if number_of(facts, step) != 1:
        return None
    first, last = facts.get(start, Located), facts.get(end, Located)
    zero = number_of(facts, start) == 0
    if last is None or not isinstance(last.content, End):
        out, count = node.outputs[0], integers_of(facts, end)
        integral = out.dtype is None or out.dtype.is_integer()
        size = count.sizes[0] if count is not None and len(count.sizes) == 1 else Size(1, ((out, 0),))
        return Located(Arange(), tokens((size,))) if zero and integral else None
    held = last.content
    before = first.content if first is not None else None
    if not (zero if held.expert == 0 else before == End(held.router, held.expert - 1)):
        raise Declined(f"the rows of expert {held.expert} do not begin where those of the one before end")
    return Located(Group(held.router, held.expert), (group_of(held.router, held.expert),))


@rows.at("ScatterND", "ScatterElements")
def add_by_token(facts: Facts, node: ir.Node, seed: ir.Value, index: ir.Value, rows: ir.Value) -> Located | None:
    """Weighted rows, added where their tokens are: the sum over the slots."""
    zeros, located, found = (facts.get(v, Located) for v in (seed, index, rows))
    if zeros is None or located is None or found is None or not isinstance(located.content, RowToken):
        return None
    held, mixed = located.content, found.content
    if not isinstance(mixed, Weighted) or mixed.over != "slot" or not held.exact or held.router != mixed.mixing.router:
        return None
    if not _of_whole_rows(node, located, found) or found.axes[:1] != located.axes[:1]:
        return None
    if text_attribute(node, "reduction", "none") != "add":
        raise Declined("the rows of a token's experts replace each other", node)
    back = Located(Complete(mixed), (held.tokens, *found.axes[1:]))
    return back if seeded(zeros, back) is not None else None


@rows.at("ScatterND")
def write_back(facts: Facts, node: ir.Node, data: ir.Value, order: ir.Value, numbers: ir.Value) -> Located | None:
    """The way back: row numbers written where the rows come from."""
    seed, index, rows = (facts.get(v, Located) for v in (data, order, numbers))
    if seed is None or index is None or rows is None or not isinstance(index.content, Order):
        return None
    held = index.content
    if not isinstance(rows.content, Arange) or index.rank != 2 or index.axes[1] or seed.rank != 1:
        return None
    if total(seed.axes[0]) != total(held.pairs):
        return None
    return Located(Inverse(held.router, held.pairs), (held.pairs,))


@rows.at("ScatterND", "ScatterElements")
def in_their_places(facts: Facts, node: ir.Node, data: ir.Value, order: ir.Value, rows: ir.Value) -> Located | None:
    """Rows written where they come from, each pair once: whatever was there before."""
    seed, index, found = (shape_of(facts, data), *(facts.get(v, Located) for v in (order, rows)))
    if index is None or found is None or not isinstance(index.content, Order) or not index.rank or not found.rank:
        return None
    written, each = text_attribute(node, "reduction", "none") == "none", _of_whole_rows(node, index, found)
    if not written or not each or found.axes[0] != index.axes[0] or isinstance(found.content, Arange):
        return None
    back = Located(found.content, (index.content.pairs, *found.axes[1:]))
    return back if seed == back.dims else None


def _of_whole_rows(node: ir.Node, index: Located, rows: Located) -> bool:
    """Whether a scatter's index is one number for each row, repeated for each feature where the operator wants that."""
    if node.op_type == "ScatterND":
        return index.rank == 2 and not index.axes[1]
    wide = [total(dim) for dim in index.axes[1:]] == [total(dim) for dim in rows.axes[1:]]
    repeated = all(atom.kind == "repeat" for dim in index.axes[1:] for atom in dim)
    return wide and repeated and bool(index.rank) and not integer_attribute(node, "axis", 0)


@rows.at("Concat")
def concatenate_rows(facts: Facts, node: ir.Node, first: ir.Value, *others: ir.Value | None) -> Located | None:
    """Every expert's rows, or every expert's output along a dimension of its own, one expert after the other."""
    leading = facts.get(first, Located)
    if leading is None or not leading.rank:
        return None
    if not only(leading.axes[0], "group"):
        if isinstance(leading.content, Mixed):
            return _piled(facts, node, leading)
        return _outputs(facts, node, leading) if isinstance(leading.content, Output) else None
    if integer_attribute(node, "axis", 0) % leading.rank:
        return None
    parts = [facts.get(value, Located) for value in node.inputs if value is not None]
    held = [part for part in parts if part is not None and part.rank]
    router = router_of(facts, held)
    if router is None or len(held) != router.experts or len(parts) != router.experts:
        raise Declined("the concatenated rows are not those of every expert", node)
    for expert, part in enumerate(held):
        atom = only(part.axes[0], "group")
        if atom is None or atom.index != expert or part.axes[1:] != leading.axes[1:]:
            raise Declined(f"the rows in place {expert} are not those of expert {expert}", node)
    together = joined([part.content for part in held], router)
    if together is None:
        raise Declined("the concatenated rows hold different things", node)
    pairs = facts.get(router.indices, Located)
    flat = () if pairs is None else tuple(atom for dim in pairs.axes for atom in dim)
    return Located(together, ((row(router, flat),), *leading.axes[1:]))


def _piled(facts: Facts, node: ir.Node, leading: Located) -> Located | None:
    """Weighted outputs along a new dimension, over which they are summed next, as over slots."""
    parts = [facts.get(value, Located) for value in node.inputs]
    held = [part.content for part in parts if part is not None and part.axes == leading.axes]
    sums = [part for part in held if isinstance(part, Mixed)]
    axis = integer_attribute(node, "axis", 0) % leading.rank
    if leading.axes[axis] or len(sums) != len(parts) or any(part.mixing != sums[0].mixing for part in sums):
        return None
    return Located(Mixed(sums[0].mixing, tuple(sums)), put(leading.axes, axis, (Atom("slot", Size(len(sums))),)))


def _outputs(facts: Facts, node: ir.Node, leading: Located) -> Located | None:
    """The outputs of all experts along a new dimension, as torch.stack writes them."""
    parts = [facts.get(value, Located) for value in node.inputs]
    held = [part.content for part in parts if part is not None and part.axes == leading.axes]
    axis = integer_attribute(node, "axis", 0) % leading.rank
    if leading.axes[axis] or len(held) != len(parts) or len(parts) == 1:
        return None
    together = joined(held, "all")
    atom = Atom("expert", Size(len(held)))
    return None if together is None else Located(together, put(leading.axes, axis, (atom,)))
