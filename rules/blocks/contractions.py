"""Contractions: every expert's share times its output, or weights times the mask of their slots, summed by the product.

Fact stated: ``Located`` with content ``Complete`` or ``Share``.
Source: torch.bmm(weights, outputs) and torch.einsum("te,teh->th", ..) behind torch.stack, as torch.onnx writes them.
"""

from __future__ import annotations

import dataclasses
import itertools

import onnx_ir as ir

from rewriter.facts import Facts, Family
from rewriter.graph.attributes import text_attribute
from rewriter.rules.blocks.axes import Axes, Dim, Located, only, unify
from rewriter.rules.blocks.combines import masked, summed, weighted
from rewriter.rules.blocks.contents import Output
from rewriter.rules.blocks.elementwise import product
from rewriter.rules.blocks.linears import contract, weight_of
from rewriter.rules.blocks.masks import every_score
from rewriter.rules.blocks.mixing import Complete, Mask, Mixing, Share, Weighted
from rewriter.rules.blocks.movement import token_rows

contractions = Family("contractions")


@contractions.at("MatMul")
def matmul(facts: Facts, node: ir.Node, a: ir.Value, b: ir.Value) -> Located | None:
    """Shares [.., 1, E] times outputs [.., E, H], or outputs [.., H, E] times shares [.., E, 1]."""
    for x, y, (one, experts) in ((a, b, (-2, -1)), (b, a, (-1, -2))):
        pair = _pair(facts, x, y)
        if pair is None or not pair[0].rank == pair[1].rank >= 2:
            continue
        share, output = pair
        lead = unify(share.axes[:-2], output.axes[:-2])
        if lead is None or share.axes[one] or not _are_experts(share.axes[experts], output.axes[one]):
            return None
        left = ((), output.axes[-1]) if one == -2 else (output.axes[-2], ())
        return _complete(y, share, output, node.outputs[0], (*lead, *left))
    return None


@contractions.at("Einsum")
def einsum(facts: Facts, node: ir.Node, a: ir.Value, b: ir.Value) -> Located | None:
    """A product by letters, of whatever a Mul makes something known of, summed over those that the result lacks."""
    operands, _, result = text_attribute(node, "equation", "").replace(" ", "").partition("->")
    terms = operands.split(",")
    if len(terms) != 2 or "." in operands:
        return None
    for (x, own), (y, others) in itertools.permutations(zip((a, b), terms, strict=True)):
        first, second = facts.get(x, Located), facts.get(y, Located)
        if second is not None and isinstance(second.content, Mask):
            first = every_score(facts, x) or first
        first = first or token_rows(facts, x)
        if first is not None and second is not None:
            found = _by_letters(facts, (x, first, own), (second, others), result, node)
            if found is not None:
                return found
    return None


def _by_letters(
    facts: Facts, x: tuple[ir.Value, Located, str], y: tuple[Located, str], result: str, node: ir.Node
) -> Located | None:
    """``sum(x * y)`` over the letters that the result lacks."""
    (value, first, own), (second, others) = x, y
    apart = [letter for letter in dict.fromkeys(own + others) if letter not in result]
    order = "".join(apart) + result
    if (len(set(own)), len(set(others))) != (first.rank, second.rank) or not set(result) <= set(own + others):
        return None
    a, b = _in_order(first, own, order), _in_order(second, others, order)
    found = product(facts, (value, a), b, node)
    for _ in apart:
        found = None if found is None else summed(found, 0, node, keep=False)
    return found


def _in_order(located: Located, letters: str, order: str) -> Located:
    """What lies by letters, with a dimension for each of others."""
    dims = dict(zip(letters, located.axes, strict=True))
    return dataclasses.replace(located, axes=tuple(dims.get(letter, ()) for letter in order))


@contractions.at("Einsum")
def einsum_of_three(facts: Facts, node: ir.Node, a: ir.Value, b: ir.Value, c: ir.Value) -> Located | None:
    """Activated features, the weights of down, and shares: an expert's output, and what it is summed with, in one."""
    operands, _, result = text_attribute(node, "equation", "").replace(" ", "").partition("->")
    terms = operands.split(",")
    if len(terms) != 3:
        return None
    for order in itertools.permutations(zip((a, b, c), terms, strict=True)):
        (x, own), (w, weights), (mixing, shares) = order
        data, weight, share = facts.get(x, Located), weight_of(facts, w, weights), facts.get(mixing, Located)
        if data is None or weight is None or share is None or not isinstance(share.content, Share | Mixing):
            continue
        left = "".join(letter for letter in dict.fromkeys(own + weights) if letter in result + shares)
        output = contract(data, weight, [own, weights], left, (node, x))
        if output is not None and isinstance(output.content, Output):
            return _by_letters(facts, (node.outputs[0], output, left), (share, shares), result, node)
    return None


def _pair(facts: Facts, share: ir.Value, output: ir.Value) -> tuple[Located, Located] | None:
    """The shares of all experts and their outputs, or weights and the mask of their slots."""
    a, b = facts.get(share, Located), facts.get(output, Located)
    if a is None or b is None or not isinstance(a.content, Share | Mixing):
        return None
    if not isinstance(b.content, Output | Mask) or (isinstance(b.content, Mask) and isinstance(a.content, Share)):
        return None
    return a, b


def _are_experts(a: Dim, b: Dim) -> bool:
    """Whether both dimensions are the experts', all of them or those of a token's slots."""
    return (only(a, "expert") or only(a, "slot")) is not None and a == b


def _complete(value: ir.Value, share: Located, output: Located, out: ir.Value, axes: Axes) -> Located | None:
    node = out.producer()
    assert node is not None
    if isinstance(output.content, Mask):
        own = masked(share.content, output.content, node)
        everything = None if own is None else frozenset(range(own.mixing.router.k))
        return None if own is None else Located(dataclasses.replace(own, slots=everything), axes)
    if isinstance(share.content, Mixing):
        share = Located(share.content, (*share.axes, ()))
    held = weighted(value, output, share, node)
    return Located(Complete(held), axes) if isinstance(held, Weighted) else None
