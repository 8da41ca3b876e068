"""Gathers: constant positions, a router's choice from a constant of all experts, rows in another order.

Facts stated: ``Located``, ``Integers``.
Source: Gather and GatherND, as torch.onnx writes ``w[e]``, ``w[ids]`` and ``x[order]``.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from rewriter.facts import Facts, Recogniser
from rewriter.rules.blocks.axes import Located
from rewriter.rules.blocks.guards import integer_attribute
from rewriter.rules.blocks.movement import token_rows
from rewriter.rules.blocks.parts import gathered, picked_sizes
from rewriter.rules.blocks.routers import chosen_from, without_unit
from rewriter.rules.blocks.rows import chosen_of, gathered_rows
from rewriter.rules.blocks.sizes import Integers
from rewriter.tensors import View


class Gather(Recogniser):
    """``Gather(data, index, axis)``."""

    def pattern(self, op: Any, data: Any, index: Any) -> Any:
        return op.Gather(data, index, _outputs=["out"])

    def recognise(self, facts: Facts, *, data: ir.Value, index: ir.Value, out: ir.Value) -> Located | Integers | None:
        node = out.producer()
        assert node is not None
        axis = integer_attribute(node, "axis", 0)
        where, constant = facts.get(index, View), facts.get(data, View)
        sizes = facts.get(data, Integers)
        if sizes is not None:
            return None if where is None or axis else picked_sizes(sizes, where)
        if where is not None:
            located = facts.get(data, Located) if constant is None else None
            return None if located is None or not located.rank else gathered(located, where, axis % located.rank)
        return taken(facts, data, facts.get(index, Located), axis)


class GatherND(Recogniser):
    """``GatherND(data, index [.., 1])``: as Gather along the first axis."""

    def pattern(self, op: Any, data: Any, index: Any) -> Any:
        return op.GatherND(data, index, _outputs=["out"])

    def recognise(self, facts: Facts, *, data: ir.Value, index: ir.Value, out: ir.Value) -> Located | None:
        node, located = out.producer(), facts.get(index, Located)
        if node is None or located is None or not located.rank or integer_attribute(node, "batch_dims", 0):
            return None
        return taken(facts, data, without_unit(located), 0)


def taken(facts: Facts, data: ir.Value, index: Located | None, axis: int) -> Located | None:
    """Returns what an index that depends on a router takes from ``data``."""
    if index is None:
        return None
    constant = facts.get(data, View)
    if constant is not None:
        by_choice = chosen_from(constant, index, axis)
        return by_choice or _sorted_choice(constant, index, axis)
    if axis:
        return None
    located = facts.get(data, Located) or token_rows(facts, data)
    return None if located is None else gathered_rows(located, index)


def _sorted_choice(constant: View, index: Located, axis: int) -> Located | None:
    choice = chosen_of(index)
    return None if choice is None else chosen_from(constant, choice, axis)


RECOGNISERS: tuple[Recogniser, ...] = (Gather(), GatherND())
