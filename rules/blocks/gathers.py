"""Gathers: a router's choice from a constant of all experts, rows in another order.

Facts stated: ``Located``.
Source: Gather and GatherND, as torch.onnx writes ``w[ids]`` and ``x[order]``; constant positions are movement.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from rewriter.facts import Facts, Family
from rewriter.facts.size import Size
from rewriter.graph.attributes import integer_attribute
from rewriter.rules.blocks.activations import is_plain_linear, number_of
from rewriter.rules.blocks.axes import Atom, Axes, Located, only, put, total, unify
from rewriter.rules.blocks.contents import Output, Slot
from rewriter.rules.blocks.mixing import Chosen, Stack
from rewriter.rules.blocks.movement import token_rows
from rewriter.rules.blocks.rows import Arange, Pick, chosen_of, gathered_rows
from rewriter.tensors import View

gathers = Family("gathers")


@gathers.at("Gather")
def gather(facts: Facts, node: ir.Node, data: ir.Value, index: ir.Value) -> Located | None:
    """``Gather(data, index, axis)`` by an index that depends on a router; constant positions are movement."""
    if facts.get(index, View) is not None:
        return None
    return taken(facts, data, facts.get(index, Located), integer_attribute(node, "axis", 0))


@gathers.at("GatherND")
def gather_nd(facts: Facts, node: ir.Node, data: ir.Value, index: ir.Value) -> Located | None:
    """``GatherND(data, index [.., 1])``: as Gather along the first axis."""
    located = facts.get(index, Located)
    if located is None or not located.rank or integer_attribute(node, "batch_dims", 0):
        return None
    return taken(facts, data, _without_unit(located), 0)


@gathers.at("GatherElements")
def gather_outputs(facts: Facts, node: ir.Node, data: ir.Value, index: ir.Value) -> Located | None:
    """The outputs of the chosen experts, of those of all of them."""
    outputs, chosen = facts.get(data, Located), facts.get(index, Located)
    if outputs is None or chosen is None or outputs.rank != chosen.rank or not outputs.rank:
        return None
    axis = integer_attribute(node, "axis", 0) % outputs.rank
    held, choice = outputs.content, chosen.content
    if not isinstance(held, Output) or not isinstance(choice, Chosen) or held.by != "all":
        return None
    if not only(outputs.axes[axis], "expert") or total(outputs.axes[axis]) != Size(choice.router.experts):
        return None
    axes = unify(put(outputs.axes, axis, ()), chosen.axes)
    slots = only(chosen.axes[axis], "slot") is not None and choice.slot is None
    return Located(held.of(choice.router), axes) if axes is not None and slots else None


@gathers.at("Concat")
def tokens_and_experts(facts: Facts, node: ir.Node, a: ir.Value, b: ir.Value) -> Located | None:
    """Every token's number beside the experts that it chose, as coordinates."""
    for chosen, numbers, at in ((b, a, 1), (a, b, 0)):
        choice, counted = facts.get(chosen, Located), facts.get(numbers, Located)
        if choice is None or counted is None or choice.rank != counted.rank or choice.rank < 2:
            continue
        held, axis = choice.content, integer_attribute(node, "axis", 0) % choice.rank
        if not isinstance(held, Chosen) or not isinstance(counted.content, Arange) or axis != choice.rank - 1:
            continue
        own = [total(dim) for dim in counted.axes[1:-1]] == [total(dim) for dim in choice.axes[1:-1]]
        repeated = all(atom.kind == "repeat" for dim in counted.axes[1:] for atom in dim) and not choice.axes[-1]
        if total(counted.axes[0]) == total(choice.axes[0]) and own and repeated and not counted.axes[-1]:
            coordinates = (Atom("coordinate", Size(2)),)
            return Located(Pick(held.router, held.slot, at), (*choice.axes[:-1], coordinates))
    return None


@gathers.at("GatherND")
def outputs_by_token(facts: Facts, node: ir.Node, data: ir.Value, index: ir.Value) -> Located | None:
    """``outputs[token, chosen]``: the outputs of the chosen experts, of those of all of them."""
    outputs, picked = facts.get(data, Located), facts.get(index, Located)
    if outputs is None or picked is None or outputs.rank < 3 or integer_attribute(node, "batch_dims", 0):
        return None
    held, pick = outputs.content, picked.content
    if not isinstance(held, Output) or not isinstance(pick, Pick) or held.by != "all":
        return None
    experts = outputs.axes[pick.expert]
    if not only(experts, "expert") or total(experts) != Size(pick.router.experts):
        return None
    if outputs.axes[1 - pick.expert] != picked.axes[0]:
        return None
    by = pick.router if pick.slot is None else Slot(pick.router, pick.slot)
    return Located(held.of(by), (*picked.axes[:-1], *outputs.axes[2:]))


@gathers.at("Mod")
def same_choice(facts: Facts, node: ir.Node, chosen: ir.Value, number: ir.Value) -> Located | None:
    """``chosen % E``, which take_along_dim writes against negative indices: there are none."""
    located, most = facts.get(chosen, Located), number_of(facts, number)
    if located is None or most is None or not isinstance(located.content, Chosen):
        return None
    return located if most >= located.content.router.experts else None


def taken(facts: Facts, data: ir.Value, index: Located | None, axis: int) -> Located | None:
    """Returns what an index that depends on a router takes from ``data``."""
    if index is None:
        return None
    constant = facts.get(data, View)
    if constant is not None:
        by_choice = _chosen_from(constant, index, axis)
        return by_choice or _sorted_choice(constant, index, axis)
    if axis:
        return None
    located = facts.get(data, Located)
    if located is None or is_plain_linear(located.content):
        located = token_rows(facts, data)
    return None if located is None else gathered_rows(located, index)


def _sorted_choice(constant: View, index: Located, axis: int) -> Located | None:
    choice = chosen_of(index)
    return None if choice is None else _chosen_from(constant, choice, axis)


def _chosen_from(stack: View, located: Located, axis: int) -> Located | None:
    """Returns what a choice gathers from a constant of all experts."""
    held = located.content
    if not isinstance(held, Chosen) or axis != 0 or not stack.rank or stack.shape[0] != held.router.experts:
        return None
    if not stack.dtype.is_floating_point():
        return None
    by = held.router if held.slot is None else Slot(held.router, held.slot)
    weights: Axes = tuple((Atom("weight", Size(d), i),) for i, d in enumerate(stack.shape) if i)
    return Located(Stack(stack, by), (*located.axes, *weights))


def _without_unit(located: Located) -> Located | None:
    """Returns indices [.., 1], as GatherND takes them, without the last dimension."""
    return dataclasses.replace(located, axes=located.axes[:-1]) if not located.axes[-1] else None
