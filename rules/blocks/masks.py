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
from rewriter.facts.size import Size
from rewriter.graph.attributes import integer_attribute
from rewriter.rules.blocks.axes import Atom, Dim, Located, only, put, unify
from rewriter.rules.blocks.elementwise import masked
from rewriter.rules.blocks.mixing import Chosen, Mask, Share, Without
from rewriter.rules.blocks.routers import last_axis
from rewriter.rules.blocks.uniform import seeded
from rewriter.tensors import View

masks = Family("masks")


@masks.at("Equal")
def equal(facts: Facts, node: ir.Node, a: ir.Value, b: ir.Value) -> Located | None:
    """The slots that hold an expert; with all experts' numbers along a dimension, of every expert."""
    for chosen, numbers in ((a, b), (b, a)):
        located, view = facts.get(chosen, Located), facts.get(numbers, View)
        if located is not None and view is not None and isinstance(located.content, Chosen):
            return _mask(located, located.content, view)
    return None


@masks.at("Equal", "Greater", "GreaterOrEqual")
def holds(facts: Facts, node: ir.Node, mask: ir.Value, number: ir.Value) -> Located | None:
    """A mask of zeros and ones, compared with a number that only its ones reach; a share that is more than nothing."""
    located, view = facts.get(mask, Located), facts.get(number, View)
    if located is None or view is None or view.size != 1 or view.rank > located.rank:
        return None
    least = float(np.asarray(view.numpy()).reshape(-1)[0])
    if isinstance(located.content, Share):
        of_one = located.content.expert is not None and located.content.slots is not None
        return located if of_one and (node.op_type, least) == ("Greater", 0.0) else None
    reached = 0 <= least < 1 if node.op_type == "Greater" else least == 1
    return located if isinstance(located.content, Mask) and reached else None


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
    numbers = np.asarray(view.numpy())
    if numbers.size == 1:
        if view.rank > located.rank:
            return None
        return dataclasses.replace(located, content=Mask(held.router, int(numbers.reshape(-1)[0]), held.slot))
    experts = held.router.experts
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
    """What there is where a mask holds, else zero: a product."""
    held = facts.get(mask, Located)
    if held is None:
        return None
    if isinstance(held.content, Without):
        held, yes, no = Located(held.content.mask, held.axes), no, yes
    weighed = facts.get(yes, Located)
    if not isinstance(held.content, Mask) or weighed is None or not _is_zero(facts, no, held, weighed):
        return None
    return masked(facts, yes, held, node)


def _is_zero(facts: Facts, value: ir.Value, *others: Located) -> bool:
    view = facts.get(value, View)
    if view is not None:
        return view.size == 1 and float(np.asarray(view.numpy()).reshape(-1)[0]) == 0.0
    located = facts.get(value, Located)
    axes = unify(others[0].axes, others[-1].axes)
    return located is not None and axes is not None and seeded(located, Located(others[0].content, axes)) is not None
