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
from rewriter.rules.blocks.combines import masked, weighted
from rewriter.rules.blocks.contents import Output
from rewriter.rules.blocks.linears import contract, weight_of
from rewriter.rules.blocks.mixing import Complete, Mask, Mixing, Share, Weighted

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
    """Shares and outputs by letters; the experts' is the one that is summed."""
    operands, _, result = text_attribute(node, "equation", "").replace(" ", "").partition("->")
    terms = operands.split(",")
    for x, y, letters in ((a, b, terms), (b, a, terms[::-1])):
        pair = _pair(facts, x, y)
        if pair is not None and len(letters) == 2:
            axes = _contracted(*pair, letters[0], letters[1], result)
            return None if axes is None else _complete(y, *pair, node.outputs[0], axes)
    return None


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
        axes = None if output is None else _contracted(share, output, shares, left, result)
        if output is not None and axes is not None and isinstance(output.content, Output):
            return _complete(node.outputs[0], share, output, node.outputs[0], axes)
    return None


def _contracted(share: Located, output: Located, mixing: str, mixed: str, result: str) -> Axes | None:
    """The dimensions of a result that sums the outputs over the experts alone."""
    summed = [letter for letter in mixed if letter not in result]
    if len(summed) != 1 or sorted(mixed) != sorted(result + summed[0]) or not set(mixing) <= set(mixed):
        return None
    if len(set(mixed)) != len(mixed) or (len(mixing), len(mixed)) != (share.rank, output.rank):
        return None
    shares, outputs = dict(zip(mixing, share.axes, strict=True)), dict(zip(mixed, output.axes, strict=True))
    if len(shares) != len(mixing) or not _are_experts(shares.get(summed[0], ()), outputs[summed[0]]):
        return None
    return unify(tuple(shares.get(letter, ()) for letter in result), tuple(outputs[letter] for letter in result))


def _pair(facts: Facts, share: ir.Value, output: ir.Value) -> tuple[Located, Located] | None:
    """Returns the shares of all experts and their outputs, or weights and the mask of their slots."""
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
