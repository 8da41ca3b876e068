"""The weights of the chosen experts: divided by their sum, bounded, scaled for all or for each expert.

Facts stated: ``Located`` with content ``Mixing`` or ``Total``.
Source: transformers' routers as torch.onnx and mobius write them.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from rewriter.facts import Facts, Family
from rewriter.facts.integers import static
from rewriter.graph.attributes import integer_attribute
from rewriter.graph.contents import name_of
from rewriter.graph.declines import OTHER_FUNCTION, OTHER_WEIGHTS, Reason, reason_of
from rewriter.rules.blocks.activations import number_of
from rewriter.rules.blocks.axes import Content, Located, only, put
from rewriter.rules.blocks.contents import Scores
from rewriter.rules.blocks.laws import of_number, of_two
from rewriter.rules.blocks.mixing import Mixing, Part, Share, Stack, Total, first_slots


def opaque(mixing: Mixing, reason: str, node: ir.Node) -> Mixing:
    """Returns weights that no operator computes, but that can be given as they are."""
    out = node.outputs[0]
    return dataclasses.replace(faulty(mixing, reason, node), opaque=out, value=out)


def summed_weights(located: Located, axis: int, *, keep: bool) -> Located | None:
    """Returns the sum of a token's weights over its slots."""
    held = located.content
    if not isinstance(held, Mixing) or held.slot is not None or not only(located.axes[axis], "slot"):
        return None
    return Located(Total(held), put(located.axes, axis, *([()] if keep else [])))


routing_weights = Family("routing weights")


@of_two.at("Div")
def divide_by_sum(first: Located, second: Located, node: ir.Node) -> Mixing | Share | None:
    """Returns weights over their sum."""
    a, b = first.content, second.content
    if isinstance(a, Share) and isinstance(b, Total):
        whole = a.slots is None or a.complete
        return dataclasses.replace(a, mixing=_over_sum(a.mixing, b.mixing, None, node)) if whole else None
    if not isinstance(a, Mixing) or not isinstance(b, Total):
        return None
    out = node.outputs[0] if a.slot is None or a.router.k == 1 else None
    quotient = _over_sum(dataclasses.replace(a, slot=None), b.mixing, out, node)
    return dataclasses.replace(quotient, slot=a.slot)


def _over_sum(a: Mixing, summed: Mixing, out: ir.Value | None, node: ir.Node) -> Mixing:
    """Weights over their sum; ``out`` holds all of a token's, where one value does."""
    if a != summed:
        return faulty(a, Reason("weights are divided by a sum of others", OTHER_WEIGHTS), node)
    if a.table is not None:
        return faulty(a, Reason("weights are scaled for each expert before they are normalised", OTHER_WEIGHTS), node)
    stage = "normalised" if a.stage == "raw" else a.stage
    quotient = dataclasses.replace(a, stage=stage, scale=1.0, fault=a.fault or summed.fault, value=out)
    return quotient if a.fault or not summed.fault else dataclasses.replace(quotient, opaque=out)


def faulty(mixing: Mixing, reason: str, node: ir.Node) -> Mixing:
    """Returns weights that no operator computes, and why; the first reason is kept."""
    return dataclasses.replace(
        mixing, fault=mixing.fault or Reason(f"{reason} (node {name_of(node)})", reason_of(reason).remedy)
    )


@of_two.at("Add")
def add_slots(first: Located, second: Located, node: ir.Node) -> Part | Total | None:
    """Returns the sum of a token's weights in other slots each."""
    a, b = _in_slots(first.content), _in_slots(second.content)
    if a is None or b is None or a.mixing != b.mixing or a.slots & b.slots:
        return None
    both = Part(a.mixing, a.slots | b.slots)
    return Total(both.mixing) if len(both.slots) == both.mixing.router.k else both


def _in_slots(held: Content) -> Part | None:
    if isinstance(held, Mixing) and held.slot is not None:
        return Part(dataclasses.replace(held, slot=None), frozenset({held.slot}))
    return held if isinstance(held, Part) else None


@of_number.at("Add")
def add_nothing(first: Located, number: float, node: ir.Node) -> Content | None:
    """Returns weights plus 0, with which a sum of them begins."""
    return first.content if not number and isinstance(first.content, Mixing | Part | Share) else None


@of_number.at("Add")
def add_epsilon(first: Located, number: float, node: ir.Node) -> Total | None:
    """Returns a sum of weights plus a number; at fault where a sum of these can notice it in float32."""
    a = first.content
    if not isinstance(a, Total) or number < 0:
        return None
    if number == 0:
        return a
    smallest = _least_sum(a.mixing)
    noticed = abs(number) * 2.0**25 > smallest
    if not smallest or noticed:
        return Total(faulty(a.mixing, Reason(f"{number:g} is added to the sum of the weights", OTHER_FUNCTION), node))
    return a


def _least_sum(mixing: Mixing) -> float:
    """What the largest of a softmax add up to at least; 0 for other weights."""
    known = mixing.scores == mixing.router.scores and mixing.scores.function == "softmax"
    return mixing.router.k / mixing.router.experts if known and mixing.scale == 1 else 0.0


@routing_weights.at("Clip")
def clip(facts: Facts, node: ir.Node, x: ir.Value, low: ir.Value, *others: ir.Value | None) -> Located | None:
    """A lower bound of the sum of weights, against a division by zero."""
    located, bound = facts.get(x, Located), number_of(facts, low)
    if located is None or bound is None or any(v is not None for v in node.inputs[2:]):
        return None
    total = bounded(located.content, bound, node)
    return None if total is None else dataclasses.replace(located, content=total)


@of_number.at("Max")
def bound(first: Located, low: float, node: ir.Node) -> Total | None:
    """Returns a sum of weights that is at least a number."""
    return bounded(first.content, low, node)


def bounded(a: Content, low: float, node: ir.Node) -> Total | None:
    """Returns a sum of weights that is at least a number: a fault, unless it is so anyway; no operator has a bound."""
    if not isinstance(a, Total) or low < 0:
        return None
    if a.mixing.stage == "raw" and a.mixing.table is None and low < _least_sum(a.mixing) / 2:
        return a
    return Total(faulty(a.mixing, f"the sum of the weights is at least {low:g}", node))


@of_number.at("Mul", "Div")
def scale(first: Located, number: float, node: ir.Node) -> Mixing | Share | None:
    """Returns weights times a number, or over one."""
    a, out = first.content, node.outputs[0]
    if node.op_type == "Div":
        if not number:
            return None
        number = 1 / number
    if isinstance(a, Mixing):
        return dataclasses.replace(a, scale=a.scale * number, value=out)
    if isinstance(a, Share):
        return dataclasses.replace(a, mixing=dataclasses.replace(a.mixing, scale=a.mixing.scale * number, value=None))
    return None


@of_two.at("Mul")
def squared(first: Located, second: Located, node: ir.Node) -> Content | None:
    """Returns weights times themselves."""
    return power(first, 2.0, node) if first == second else None


@of_number.at("Pow")
def power(first: Located, exponent: float, node: ir.Node) -> Content | None:
    """Returns the square of weights, which no operator computes and which is never negative."""
    a = first.content
    if not isinstance(a, Mixing) or a.slot is not None or exponent != 2:
        return None
    square = opaque(a, "weights are squared", node)
    return dataclasses.replace(square, scores=Scores(a.dense, "positive"), scale=1.0, late=True)


@routing_weights.at("ReduceMin")
def least(facts: Facts, node: ir.Node, x: ir.Value, *others: ir.Value | None) -> Located | None:
    """The least of the chosen scores: that of the last slot."""
    located, axes = facts.get(x, Located), static(facts, node, 1, "axes")
    held = None if located is None else located.content
    if located is None or not isinstance(held, Mixing) or axes is None or len(axes) != 1 or held.slot is not None:
        return None
    axis, keep = axes[0] % located.rank, integer_attribute(node, "keepdims", 1)
    if not only(located.axes[axis], "slot") or held.stage != "raw" or first_slots(held.router, held.router.k) is None:
        return None
    last = dataclasses.replace(held, slot=held.router.k - 1, value=None)
    return Located(last, put(located.axes, axis, *([()] if keep else [])))


@routing_weights.at("Abs")
def magnitude(facts: Facts, node: ir.Node, x: ir.Value) -> Located | None:
    """The magnitude of weights that are never negative."""
    located = facts.get(x, Located)
    return located if located is not None and isinstance(located.content, Mixing) and located.content.positive else None


@routing_weights.at("ReduceL1")
def norm(facts: Facts, node: ir.Node, x: ir.Value, *others: ir.Value | None) -> Located | None:
    """The sum of the magnitudes of weights that are never negative."""
    located, axes = magnitude(facts, node, x), static(facts, node, 1, "axes")
    if located is None or axes is None or len(axes) != 1:
        return None
    return summed_weights(located, axes[0] % located.rank, keep=bool(integer_attribute(node, "keepdims", 1)))


@of_two.at("Mul")
def scale_by_table(first: Located, second: Located, node: ir.Node) -> Mixing | None:
    """Returns weights times a factor that is gathered for every chosen expert."""
    a, b = first.content, second.content
    if not isinstance(a, Mixing) or not isinstance(b, Stack):
        return None
    if b.by != a.router or b.view.rank != 1 or a.table is not None:
        return faulty(
            a, Reason("weights are scaled by something other than a factor for each chosen expert", OTHER_WEIGHTS), node
        )
    return dataclasses.replace(a, table=b.view, value=node.outputs[0])
