"""Grouped rows: (token, slot) pairs sorted by expert, one matrix product for each expert's rows, and the way back.

Facts stated: ``Located`` with a content of ``recognise.rows``; gathered and concatenated rows keep their content, on a
``row`` or ``group`` index.
Source: transformers' grouped_mm as torch.onnx writes it: sort, histogram, cumulated ends, a Range for each expert.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir

from rewriter.facts import Facts, Recogniser
from rewriter.rule import Declined
from rewriter.rules.blocks.activations import number_of
from rewriter.rules.blocks.axes import Atom, Axes, Content, Dim, Located, Size, Uniform, only, put, total, unify
from rewriter.rules.blocks.contents import Output, Router
from rewriter.rules.blocks.guards import cast_type, float_attribute, integer_attribute, text_attribute
from rewriter.rules.blocks.joined import joined, router_of
from rewriter.rules.blocks.mixing import Chosen
from rewriter.rules.blocks.rows import (
    Arange,
    Counts,
    End,
    Group,
    Inverse,
    Order,
    RowSlot,
    RowToken,
    Sorted,
    row,
)
from rewriter.rules.blocks.sizes import integers_of
from rewriter.rules.blocks.uniform import uniform_of
from rewriter.tensors import View


class Sort(Recogniser):
    """``TopK(chosen, as many as there are, smallest first)``."""

    def pattern(self, op: Any, chosen: Any, k: Any) -> Any:
        return op.TopK(chosen, k, _outputs=["values", "indices"])

    def recognise(
        self, facts: Facts, *, chosen: ir.Value, k: ir.Value, values: ir.Value, indices: ir.Value
    ) -> dict[ir.Value, object] | None:
        node, located, count = values.producer(), facts.get(chosen, Located), integers_of(facts, k)
        if node is None or located is None or not isinstance(located.content, Chosen) or located.rank != 1:
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


class RowArithmetic(Recogniser):
    """Integer arithmetic on rows: token and slot of a pair; a function of the expert; what is the same for all."""

    def __init__(self, op_type: str) -> None:
        super().__init__(name=op_type)
        self._op_type = op_type

    def pattern(self, op: Any, a: Any, b: Any) -> Any:
        return getattr(op, self._op_type)(a, b, _outputs=["out"])

    def recognise(self, facts: Facts, *, a: ir.Value, b: ir.Value, out: ir.Value) -> Located | None:
        first, second = facts.get(a, Located), facts.get(b, Located)
        if self._op_type in ("And", "Equal"):
            return self._logic(facts, a, b, first, second)
        number = number_of(facts, b)
        if first is None or number is None:
            return None
        held = self._apply(first.content, number, facts.get(b, View))
        return None if held is None else Located(held, first.axes)

    def _apply(self, held: Content, number: float, view: View | None) -> Content | None:
        if isinstance(held, Order):
            k = held.router.k
            if self._op_type == "Less":
                return Uniform(0.0) if number <= 0 else None
            if self._op_type == "GreaterOrEqual":
                return Uniform(1.0) if number <= 0 else None
            if number == k and self._op_type == "Mod":
                return RowSlot(held.router)
            return RowToken(held.router, held.pairs[:-1]) if number == k and self._op_type == "Div" else None
        if isinstance(held, Sorted) and self._op_type == "Div" and view is not None and number:
            dtype = view.dtype.numpy()
            values = np.array(held.values, dtype) / np.array(number, dtype)
            return Sorted(held.router, tuple(float(v) for v in values))
        return None

    def _logic(
        self, facts: Facts, a: ir.Value, b: ir.Value, first: Located | None, second: Located | None
    ) -> Located | None:
        numbers = uniform_of(facts, a), uniform_of(facts, b)
        located = first or second
        if located is None:
            return None
        axes = located.axes if first is None or second is None else unify(first.axes, second.axes)
        if axes is None:
            return None
        if self._op_type == "And" and 0.0 in numbers and first is not None and second is not None:
            return Located(Uniform(0.0), axes)
        if self._op_type == "Equal" and numbers[0] is not None and numbers[1] is not None:
            return Located(Uniform(float(numbers[0] == numbers[1])), axes)
        return None


class RowCast(Recogniser):
    """A cast of sorted experts, counts or slots; of experts, what it makes of each."""

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Cast(x, _outputs=["out"])

    def recognise(self, facts: Facts, *, x: ir.Value, out: ir.Value) -> Located | None:
        node, located = out.producer(), facts.get(x, Located)
        if node is None or located is None:
            return None
        held = located.content
        if isinstance(held, Counts | RowSlot | Order | RowToken):
            return located
        if not isinstance(held, Sorted):
            return None
        to = cast_type(node)
        if to is None or to not in (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.INT32, ir.DataType.INT64):
            return None
        values = np.array(held.values).astype(to.numpy())
        return dataclasses.replace(located, content=Sorted(held.router, tuple(float(v) for v in values)))


class RowClip(Recogniser):
    """Bounds of sorted experts."""

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Clip(x, _allow_other_inputs=True, _outputs=["out"])

    def recognise(self, facts: Facts, *, x: ir.Value, out: ir.Value) -> Located | None:
        node, located = out.producer(), facts.get(x, Located)
        if node is None or located is None or not isinstance(located.content, Sorted):
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


class Histogram(Recogniser):
    """``ScatterElements(zeros [E], experts of the rows, ones, reduction=add)``: how many rows each expert has."""

    def pattern(self, op: Any, zeros: Any, experts: Any, ones: Any) -> Any:
        return op.ScatterElements(zeros, experts, ones, _outputs=["out"])

    def recognise(
        self, facts: Facts, *, zeros: ir.Value, experts: ir.Value, ones: ir.Value, out: ir.Value
    ) -> Located | None:
        node, located, updates = out.producer(), facts.get(experts, Located), facts.get(ones, Located)
        if node is None or located is None or updates is None or not isinstance(located.content, Sorted):
            return None
        router = located.content.router
        if updates.content != Uniform(1.0) or text_attribute(node, "reduction", "none") != "add":
            return None
        if located.content.values != tuple(float(e) for e in range(router.experts)):
            raise Declined("the histogram counts something other than each expert's rows", node)
        seed, begin = facts.get(zeros, Located), facts.get(zeros, View)
        counted = begin is not None and begin.shape == (router.experts,) and not np.any(begin.numpy())
        if seed is not None and seed.content == Uniform(0.0):
            counted = seed.rank == 1 and total(seed.axes[0]) == Size(router.experts)
        return Located(Counts(router), (_experts(router),)) if counted else None


def _experts(router: Router) -> Dim:
    return (Atom("expert", Size(router.experts)),)


class CumSum(Recogniser):
    """Where each expert's rows end."""

    def pattern(self, op: Any, counts: Any, axis: Any) -> Any:
        return op.CumSum(counts, axis, _outputs=["out"])

    def recognise(self, facts: Facts, *, counts: ir.Value, axis: ir.Value, out: ir.Value) -> Located | None:
        node, located = out.producer(), facts.get(counts, Located)
        if node is None or located is None or not isinstance(located.content, Counts) or located.content.cumulated:
            return None
        if integer_attribute(node, "exclusive", 0) or integer_attribute(node, "reverse", 0):
            return None
        return dataclasses.replace(located, content=Counts(located.content.router, cumulated=True))


class Range(Recogniser):
    """The numbers of an expert's rows, or all numbers from 0."""

    def pattern(self, op: Any, start: Any, end: Any, step: Any) -> Any:
        return op.Range(start, end, step, _outputs=["out"])

    def recognise(
        self, facts: Facts, *, start: ir.Value, end: ir.Value, step: ir.Value, out: ir.Value
    ) -> Located | None:
        if number_of(facts, step) != 1:
            return None
        first, last = facts.get(start, Located), facts.get(end, Located)
        zero = number_of(facts, start) == 0
        if last is None or not isinstance(last.content, End):
            integral = out.dtype is None or out.dtype.is_integer()
            return Located(Arange(), ((Atom("token", Size(1, ((out, 0),))),),)) if zero and integral else None
        held = last.content
        before = first.content if first is not None else None
        if not (zero if held.expert == 0 else before == End(held.router, held.expert - 1)):
            raise Declined(f"the rows of expert {held.expert} do not begin where those of the one before end")
        size = Size(1, ((held.router.node.outputs[1], -1 - held.expert),))
        return Located(Group(held.router, held.expert), ((Atom("group", size, held.expert),),))


class ScatterND(Recogniser):
    """The way back: row numbers written where the rows come from."""

    def pattern(self, op: Any, data: Any, order: Any, numbers: Any) -> Any:
        return op.ScatterND(data, order, numbers, _outputs=["out"])

    def recognise(
        self, facts: Facts, *, data: ir.Value, order: ir.Value, numbers: ir.Value, out: ir.Value
    ) -> Located | None:
        seed, index, rows = (facts.get(v, Located) for v in (data, order, numbers))
        if seed is None or index is None or rows is None or not isinstance(index.content, Order):
            return None
        held = index.content
        if not isinstance(rows.content, Arange) or index.rank != 2 or index.axes[1] or seed.rank != 1:
            return None
        if total(seed.axes[0]) != total(held.pairs):
            return None
        return Located(Inverse(held.router, held.pairs), (held.pairs,))


class Concat(Recogniser):
    """Every expert's rows, or every expert's output along a dimension of its own, one expert after the other."""

    def pattern(self, op: Any, first: Any) -> Any:
        return op.Concat(first, _allow_other_inputs=True, _outputs=["out"])

    def recognise(self, facts: Facts, *, first: ir.Value, out: ir.Value) -> Located | None:
        node, leading = out.producer(), facts.get(first, Located)
        if node is None or leading is None or not leading.rank:
            return None
        if not only(leading.axes[0], "group"):
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
        pairs = facts.get(router.node.outputs[1], Located)
        flat = () if pairs is None else tuple(atom for dim in pairs.axes for atom in dim)
        return Located(together, ((row(router, flat),), *leading.axes[1:]))


def _outputs(facts: Facts, node: ir.Node, leading: Located) -> Located | None:
    """The outputs of all experts along a new dimension, as torch.stack writes them."""
    parts = [facts.get(value, Located) for value in node.inputs]
    held = [part.content for part in parts if part is not None and part.axes == leading.axes]
    axis = integer_attribute(node, "axis", 0) % leading.rank
    if leading.axes[axis] or len(held) != len(parts):
        return None
    together = joined(held, "all")
    atom = Atom("expert", Size(len(held)))
    return None if together is None else Located(together, put(leading.axes, axis, (atom,)))


RECOGNISERS: tuple[Recogniser, ...] = (
    Sort(),
    *(RowArithmetic(name) for name in ("Less", "GreaterOrEqual", "Mod", "Div", "And", "Equal")),
    RowCast(),
    RowClip(),
    Histogram(),
    CumSum(),
    Range(),
    ScatterND(),
    Concat(),
)
