"""Masks: where a router chose an expert, as comparisons, one-hot vectors and what is made of these say it.

Fact stated: ``Located`` with content ``Mask``, or ``Without`` where one is negated; a Where by a mask is a product.
Source: ``ids == e``, ``one_hot(ids)``, ``mask.any(-1)``, ``masked_fill(ids != e, 0)`` as torch.onnx writes them.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from rewriter.facts import Facts, Family
from rewriter.facts.integers import static
from rewriter.facts.shapes import shape_of
from rewriter.facts.size import Size
from rewriter.graph.attributes import integer_attribute
from rewriter.rule import Declined
from rewriter.rules.blocks.activations import number_of
from rewriter.rules.blocks.axes import Atom, Dim, Located, only, put, unify
from rewriter.rules.blocks.contents import Scores
from rewriter.rules.blocks.elementwise import masked
from rewriter.rules.blocks.laws import of_two
from rewriter.rules.blocks.mixing import Chosen, Every, Mask, Mixing, Share, Sparse, Without, first_slots
from rewriter.rules.blocks.routers import last_axis, scores_of
from rewriter.rules.blocks.rows import chosen_of
from rewriter.rules.blocks.token_axes import token_axes
from rewriter.rules.blocks.uniform import NOTHING, seeded, uniform_of
from rewriter.tensors import View

masks = Family("masks")


@masks.at("Equal")
def equal(facts: Facts, node: ir.Node, a: ir.Value, b: ir.Value) -> Located | None:
    """The slots that hold an expert; with all experts' numbers along a dimension, of every expert."""
    for chosen, numbers in ((a, b), (b, a)):
        located, view = facts.get(chosen, Located), facts.get(numbers, View)
        choice = None if located is None else chosen_of(located) or located
        if choice is not None and view is not None and isinstance(choice.content, Chosen):
            return _mask(choice, choice.content, view)
    return None


@masks.at("Equal", "Greater", "GreaterOrEqual")
def holds(facts: Facts, node: ir.Node, mask: ir.Value, number: ir.Value) -> Located | None:
    """A mask of zeros and ones, compared with a number that only its ones reach; a share that is more than nothing."""
    located, least, dims = facts.get(mask, Located), number_of(facts, number), shape_of(facts, number)
    if located is None or least is None or len(dims or ()) > located.rank:
        return None
    if isinstance(located.content, Share):
        if located.content.slots is None or (node.op_type, least) != ("Greater", 0.0):
            return None
        everyone = located.content.expert is None and located.content.complete and located.content.mixing.positive
        if everyone and not located.content.mixing.router.made and not located.content.mixing.fault:
            return dataclasses.replace(located, content=Mask(located.content.mixing.router, None, whole=True))
        return located if located.content.expert is not None else None
    reached = 0 <= least < 1 if node.op_type == "Greater" else least == 1
    return located if isinstance(located.content, Mask) and reached else None


_REVERSED = {"GreaterOrEqual": "LessOrEqual", "Greater": "Less", "LessOrEqual": "GreaterOrEqual", "Less": "Greater"}


@masks.at(*_REVERSED)
def threshold(facts: Facts, node: ir.Node, a: ir.Value, b: ir.Value) -> Located | None:
    """Scores that reach the least of the chosen ones, or exceed the largest of the others: those of the chosen."""
    for value, bound, op_type in ((a, b, node.op_type), (b, a, _REVERSED[node.op_type])):
        located, every = facts.get(bound, Located), every_score(facts, value)
        held = None if located is None else located.content
        if every is None or located is None or not isinstance(held, Mixing) or held.slot is None:
            continue
        axes = unify(every.axes, located.axes)
        if held.dense is not value or (held.stage, held.scale, held.table) != ("raw", 1.0, None) or axes is None:
            return None
        router = first_slots(held.router, held.slot + (op_type in ("GreaterOrEqual", "Less")))
        if router is None:
            return None
        if value.dtype not in (None, ir.DataType.FLOAT, ir.DataType.DOUBLE):
            raise Declined("a threshold lets in all of equal scores, which halves often have", node)
        mask = Mask(router, None, whole=True)
        return Located(mask if op_type.startswith("Greater") else Without(mask), axes)
    return None


def every_score(facts: Facts, value: ir.Value) -> Located | None:
    """Returns a value as the scores of all experts, where it is known to be some, or something chooses by it."""
    dims, lead = shape_of(facts, value), token_axes(facts, value)
    known = facts.get(value, Scores) or any(use.node.op_type in ("TopK", "ArgMax") for use in value.uses())
    if not known or not dims or lead is None or dims[-1].constant is None:
        return None
    return Located(Every(scores_of(facts, value), value), (*lead, experts_dim(dims[-1].constant)))


@of_two.at("Mul")
def chosen_scores(a: Located, b: Located, node: ir.Node) -> Share | None:
    """Returns the scores of all experts times the mask of the chosen ones."""
    scores, mask = a.content, b.content
    if not isinstance(scores, Every) or not isinstance(mask, Mask) or mask.expert is not None or mask.router.made:
        return None
    every = frozenset(range(mask.router.k)) if mask.whole else None
    slots = every if mask.slot is None else frozenset({mask.slot})
    return Share(Mixing(mask.router, scores.scores, scores.value), None, slots)


@masks.at("Not")
def negated(facts: Facts, node: ir.Node, mask: ir.Value) -> Located | None:
    """Where a mask does not hold."""
    located = facts.get(mask, Located)
    if located is None or not isinstance(located.content, Mask):
        return None
    return dataclasses.replace(located, content=Without(located.content))


@masks.at("ReduceMax", "ReduceSum")
def any_slot(facts: Facts, node: ir.Node, mask: ir.Value, *others: ir.Value | None) -> Located | None:
    """Whether any slot holds an expert; a sum says so too, as the experts of a token are different ones."""
    located, axes = facts.get(mask, Located), static(facts, node, 1, "axes")
    if located is None or not isinstance(located.content, Mask) or axes is None or len(axes) != 1:
        return None
    held, axis = located.content, axes[0] % located.rank
    if held.slot is not None or held.whole or not only(located.axes[axis], "slot") or held.router.made:
        return None
    left = [()] if integer_attribute(node, "keepdims", 1) else []
    return Located(dataclasses.replace(held, whole=True), put(located.axes, axis, *left))


@masks.at("Or")
def either(facts: Facts, node: ir.Node, a: ir.Value, b: ir.Value) -> Located | None:
    """Whether one of both slots holds an expert, where there are no others."""
    first, second = facts.get(a, Located), facts.get(b, Located)
    if first is None or second is None or first.axes != second.axes:
        return None
    one, other = first.content, second.content
    if not isinstance(one, Mask) or not isinstance(other, Mask) or {one.slot, other.slot} != {0, 1}:
        return None
    if one.router.k != 2 or dataclasses.replace(one, slot=None) != dataclasses.replace(other, slot=None):
        return None
    return Located(dataclasses.replace(one, slot=None, whole=True), first.axes)


def _mask(located: Located, held: Chosen, view: View) -> Located | None:
    if view.size == 1:
        mask = Mask(held.router, int(view.number), held.slot)
        return None if view.rank > located.rank else Located(mask, located.axes)
    numbers, experts = np.asarray(view.numpy()), held.router.experts
    counted = numbers.size == experts and numbers.reshape(-1).tolist() == list(range(experts))
    if not counted or experts not in view.shape or view.rank > located.rank:
        return None
    position = located.rank - view.rank + view.shape.index(experts)
    if located.axes[position]:
        return None
    axes = put(located.axes, position, experts_dim(experts))
    return Located(Mask(held.router, None, held.slot), axes)


def experts_dim(count: int) -> Dim:
    """Returns the dimension of all experts."""
    return (Atom("expert", Size(count)),)


@masks.at("OneHot")
def one_hot(facts: Facts, node: ir.Node, chosen: ir.Value, depth: ir.Value, values: ir.Value) -> Located | None:
    """The mask of every expert, ones and zeros along a new last dimension."""
    located, pair = facts.get(chosen, Located), facts.get(values, View)
    if located is None or not isinstance(located.content, Chosen) or pair is None:
        return None
    held = located.content
    if static(facts, node, 1) != [held.router.experts] or not last_axis(node, located.rank + 1):
        return None
    if [float(v) for v in np.asarray(pair.numpy()).reshape(-1)] != [0.0, 1.0]:
        return None
    return Located(Mask(held.router, None, held.slot), (*located.axes, experts_dim(held.router.experts)))


@masks.at("Where")
def where(facts: Facts, node: ir.Node, mask: ir.Value, yes: ir.Value, no: ir.Value) -> Located | None:
    """What there is where a mask holds, else zero: a product; or logits, else minus infinity."""
    held = facts.get(mask, Located)
    if held is None:
        return None
    if isinstance(held.content, Without):
        held, yes, no = Located(held.content.mask, held.axes), no, yes
    weighed = facts.get(yes, Located)
    if not isinstance(held.content, Mask):
        return None
    every, number = every_score(facts, yes), uniform_of(facts, no)
    if every is not None and number is not None and number <= NOTHING and held.content.whole:
        axes, mixing = unify(every.axes, held.axes), Mixing(held.content.router, scores_of(facts, yes), yes)
        return None if axes is None or held.content.router.made else Located(Sparse(mixing), axes)
    weighed = weighed or every
    if weighed is None or not _is_zero(facts, no, held, weighed):
        return None
    return masked(facts, yes, held, node)


def _is_zero(facts: Facts, value: ir.Value, *others: Located) -> bool:
    view = facts.get(value, View)
    if view is not None:
        return view.size == 1 and view.number == 0.0
    located = facts.get(value, Located)
    axes = unify(others[0].axes, others[-1].axes)
    return located is not None and axes is not None and seeded(located, Located(others[0].content, axes)) is not None
