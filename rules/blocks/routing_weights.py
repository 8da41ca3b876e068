"""The weights of the chosen experts: divided by their sum, bounded, scaled for all or for each expert.

Facts stated: ``Located`` with content ``Mixing`` or ``Total``.
Source: transformers' routers as torch.onnx and mobius write them.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from rewriter.facts import Facts, Family
from rewriter.graph.contents import name_of
from rewriter.graph.declines import OTHER_FUNCTION, OTHER_WEIGHTS, Reason, reason_of
from rewriter.rules.blocks.activations import number_of
from rewriter.rules.blocks.axes import Content, Located, only, put
from rewriter.rules.blocks.laws import of_number, of_two
from rewriter.rules.blocks.mixing import Mixing, Share, Stack, Total


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
def divide_by_sum(first: Located, second: Located, node: ir.Node) -> Mixing | None:
    """Returns weights over their sum."""
    a, b = first.content, second.content
    if not isinstance(a, Mixing) or not isinstance(b, Total):
        return None
    if a != b.mixing:
        return faulty(a, Reason("weights are divided by a sum of others", OTHER_WEIGHTS), node)
    if a.table is not None:
        return faulty(a, Reason("weights are scaled for each expert before they are normalised", OTHER_WEIGHTS), node)
    stage = "normalised" if a.stage == "raw" else a.stage
    out = node.outputs[0]
    quotient = dataclasses.replace(a, stage=stage, scale=1.0, fault=a.fault or b.mixing.fault, value=out)
    return quotient if a.fault or not b.mixing.fault else dataclasses.replace(quotient, opaque=out)


def faulty(mixing: Mixing, reason: str, node: ir.Node) -> Mixing:
    """Returns weights that no operator computes, and why; the first reason is kept."""
    return dataclasses.replace(
        mixing, fault=mixing.fault or Reason(f"{reason} (node {name_of(node)})", reason_of(reason).remedy)
    )


@of_number.at("Add")
def add_epsilon(first: Located, number: float, node: ir.Node) -> Total | None:
    """Returns a sum of weights plus a number; at fault where a sum of these can notice it in float32."""
    a = first.content
    if not isinstance(a, Total) or number < 0:
        return None
    router, mixing = a.mixing.router, a.mixing
    if number == 0:
        return a
    smallest = router.k / router.experts
    noticed = abs(number) * 2.0**25 > smallest
    if mixing.scores != router.scores or mixing.scores.function != "softmax" or mixing.scale != 1 or noticed:
        return Total(faulty(mixing, Reason(f"{number:g} is added to the sum of the weights", OTHER_FUNCTION), node))
    return a


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
    """Returns a sum of weights that is at least a number, which is a fault: no operator has such a bound."""
    if not isinstance(a, Total) or low < 0:
        return None
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
