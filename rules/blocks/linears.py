"""Linears: tokens, or activated features, times a constant weight: one expert's, all experts', or the chosen one's.

Facts stated: ``Located`` with content ``Features`` (of tokens) or ``Output`` (of activated features). A slice of
the output features is stated as a linear with those rows of the weight.
Source: MatMul, Gemm, Einsum and com.microsoft::MatMulNBits, with biases as their own input or as an Add.
"""

from __future__ import annotations

import contextlib
import dataclasses

import onnx_ir as ir

from rewriter.facts import Facts, Family
from rewriter.facts.size import Size
from rewriter.graph.attributes import float_attribute, integer_attribute, text_attribute
from rewriter.graph.declines import FOLDED, PLAIN_MATMUL
from rewriter.graph.walk import GaveUp, producers, walk
from rewriter.operators.matmul_nbits import MATMUL_NBITS
from rewriter.operators.operator import DOMAIN
from rewriter.rule import Declined
from rewriter.rules.blocks.activations import as_features, is_plain_linear
from rewriter.rules.blocks.axes import Atom, Axes, Content, Located, feature, only, put, unify
from rewriter.rules.blocks.biases import with_bias
from rewriter.rules.blocks.classify import classify
from rewriter.rules.blocks.combines import summed, weighted
from rewriter.rules.blocks.contents import By, Dense, Factor, Features, Linear, Output, Packed, Tokens, Weight
from rewriter.rules.blocks.mixing import Admitted, Carried, Stack
from rewriter.rules.blocks.movement import token_rows
from rewriter.tensors import View

linears = Family("linears")
_NEAR = 64


def apply(held: Content | None, weight: Weight, by: By, node: ir.Node, read: ir.Value) -> Content | None:
    """Returns what a weight makes of a content.

    Raises:
        Declined: the features are activated by a function that no operator has.
    """
    if isinstance(held, Tokens):
        return Features((Factor(Linear(held.x, weight, None, by)),))
    if isinstance(held, Admitted):
        own = "all" if held.share.expert is None else "one"
        return Features((Factor(Linear(held.x, weight, None, by, held.share)),)) if by == own else None
    if isinstance(held, Carried):
        output = apply(held.features, weight, by, node, read)
        return None if output is None else weighted(node.outputs[0], Located(output, ()), held.share, node)
    if isinstance(held, Output):
        held = as_features(held)
    if not isinstance(held, Features):
        return None
    if any(factor.linear.by != by for factor in held.factors):
        raise Declined("the projections of an expert are not those of one expert", node)
    activation, gate, up = classify(held, node)
    return Output(activation, gate, up, weight, inner=read)


def operand(facts: Facts, value: ir.Value, k: int | None = None) -> Located | None:
    """``value`` as what a weight can be applied to: what it is known to be, or tokens in their own right."""
    located = facts.get(value, Located)
    if (
        located is None
        or isinstance(located.content, Tokens | Admitted | Carried | Stack)
        or as_features(located.content) is not None
    ):
        return located or token_rows(facts, value, k)
    kinds = {atom.kind for dim in located.axes for atom in dim}
    return token_rows(facts, value, k) if kinds <= {"token", "feature"} else None


def _tokens_behind(facts: Facts, data: Located, read: ir.Value) -> Located:
    """What one expert's plain linear made, as the tokens of others: where it was before it was moved about."""
    if not is_plain_linear(data.content):
        return data
    there = facts.get(read, Located)

    def unmoved(at: ir.Value) -> list[ir.Value]:
        known = ((v, facts.get(v, Located)) for v in producers(at)[:1])
        return [v for v, before in known if before and there and before.content is there.content]

    *_, at = walk([read], unmoved, limit=None)
    located = facts.get(at, Located)
    rows = token_rows(facts, at)
    if rows is None or located is None or rows.axes != located.axes:
        return data
    return dataclasses.replace(data, content=rows.content)


def _floatweight_of(facts: Facts, value: ir.Value | None) -> View | None:
    view = facts.get(value, View)
    return view if view is not None and view.rank >= 2 and view.dtype.is_floating_point() else None


@linears.at("MatMul")
def matmul(facts: Facts, node: ir.Node, a: ir.Value, b: ir.Value) -> Located | None:
    """``MatMul(x, w)``; the weight may be constant, or gathered by a router's choice and on either side."""
    view = _floatweight_of(facts, b)
    if view is not None:
        return _times_constant(facts, a, view, node)
    left, right = facts.get(a, Located), facts.get(b, Located)
    if right is None and _is_of_constants(facts, b):
        raise Declined("a weight is computed from constants when the model runs", node, remedy=FOLDED)
    if right is not None and isinstance(right.content, Stack):
        data = operand(facts, a)
        return None if data is None else _times_chosen(_tokens_behind(facts, data, a), right, node, a)
    if left is None or right is None or not isinstance(left.content, Stack):
        return None
    if min(left.rank, right.rank) > 1:
        flipped = _times_chosen(_flip(_tokens_behind(facts, right, b)), _flip(left), node, b)
        return None if flipped is None else _flip(flipped)
    return None


def _is_of_constants(facts: Facts, value: ir.Value) -> bool:
    """Whether a matrix is made of constants alone, and is none that is known."""

    def before(at: ir.Value) -> list[ir.Value]:
        return [] if facts.get(at, View) is not None else producers(at)

    with contextlib.suppress(GaveUp):
        return all(at.producer() or facts.get(at, View) is not None for at in walk([value], before, limit=_NEAR))
    return False


def _flip(located: Located) -> Located:
    return dataclasses.replace(located, axes=(*located.axes[:-2], located.axes[-1], located.axes[-2]))


def _times_constant(facts: Facts, x: ir.Value, view: View, node: ir.Node) -> Located | None:
    k, n = view.shape[-2:]
    data = operand(facts, x, k)
    if data is None or not data.rank or _feature_size(data, -1) != k:
        return None
    if all(d == 1 for d in view.shape[:-2]):
        if data.rank < view.rank:
            return None
        held = apply(data.content, Dense((view if view.rank == 2 else view.reshape((k, n))).T), "one", node, x)
        return None if held is None else Located(held, put(data.axes, data.rank - 1, feature(n)))
    if view.rank != 3 or data.rank > 3:
        return None
    data = _tokens_behind(facts, data, x)
    expert = (Atom("expert", Size(view.shape[0])),)
    lead = unify((data.axes[0] if data.rank == 3 else (),), (expert,))
    held = None if lead is None else apply(data.content, Dense(view.transpose((0, 2, 1))), "all", node, x)
    if held is None or lead is None:
        return None
    return Located(held, (lead[0], data.axes[-2], feature(n)))


def _times_chosen(data: Located, stack: Located, node: ir.Node, read: ir.Value) -> Located | None:
    """Features [.., K] times gathered weights [.., K, N]."""
    held = stack.content
    if data.rank < 2 or stack.rank < 2:
        return None
    inner, outer = only(stack.axes[-2], "weight"), only(stack.axes[-1], "weight")
    if not isinstance(held, Stack) or inner is None or outer is None:
        return None
    batch = unify(data.axes[:-2], stack.axes[:-2])
    if batch is None or _feature_size(data, -1) != inner.size.constant or outer.size.constant is None:
        return None
    weight = Dense(held.view.transpose((0, outer.index, inner.index)))
    product = apply(data.content, weight, held.by, node, read)
    return None if product is None else Located(product, (*batch, data.axes[-2], feature(outer.size.constant)))


def _feature_size(data: Located, position: int) -> int | None:
    atom = only(data.axes[position], "feature")
    return None if atom is None else atom.size.constant


@linears.at("Gemm")
def gemm(facts: Facts, node: ir.Node, x: ir.Value, w: ir.Value, *others: ir.Value | None) -> Located | None:
    """``Gemm(x, w[, c])`` with no factors and no transposition of x."""
    view = _floatweight_of(facts, w)
    if view is None or view.rank != 2 or integer_attribute(node, "transA", 0):
        return None
    c = node.inputs[2] if len(node.inputs) > 2 else None
    if float_attribute(node, "alpha", 1.0) != 1.0 or (c is not None and float_attribute(node, "beta", 1.0) != 1.0):
        raise Declined("alpha or beta of Gemm is not 1", node, remedy=PLAIN_MATMUL)
    product = _times_constant(facts, x, view.T if integer_attribute(node, "transB", 0) else view, node)
    if product is None or c is None:
        return product
    bias = facts.get(c, View)
    held = None if bias is None else with_bias(product, bias)
    return None if held is None else dataclasses.replace(product, content=held)


@linears.at(MATMUL_NBITS.name, domain=DOMAIN)
def matmul_nbits(facts: Facts, node: ir.Node, x: ir.Value, *others: ir.Value | None) -> Located | None:
    """``MatMulNBits(x, codes, scales, ..)`` in the standard layout."""
    inputs = [*node.inputs, *[None] * (6 - len(node.inputs))]
    codes, scales, zeros = (facts.get(value, View) for value in inputs[1:4])
    bits, block = integer_attribute(node, "bits", 4), integer_attribute(node, "block_size", 0)
    k, n = integer_attribute(node, "K", 0), integer_attribute(node, "N", 0)
    if codes is None or scales is None or not (k and n and block) or (zeros is None) != (inputs[3] is None):
        return None
    if inputs[4] is not None or integer_attribute(node, "weight_prepacked", 0):
        raise Declined("the codes are reordered (g_idx) or prepacked", node)
    if zeros is not None and zeros.dtype != ir.DataType.UINT8:
        raise Declined("the zero points are not packed integers", node)
    blocks, blob = -(-k // block), block * bits // 8
    if (codes.size, scales.size) != (n * blocks * blob, n * blocks) or (zeros is not None and zeros.size % n):
        return None
    weight = Packed(
        codes.reshape((n, blocks, blob)),
        scales.reshape((n, blocks)),
        None if zeros is None else zeros.reshape((n, zeros.size // n)),
        k,
        bits,
        block,
    )
    data = operand(facts, x, k)
    if data is None or not data.rank or _feature_size(data, -1) != k:
        return None
    held = apply(data.content, weight, "one", node, x)
    bias = facts.get(inputs[5], View)
    if held is None or (bias is None) != (inputs[5] is None):
        return None
    product = Located(held, put(data.axes, data.rank - 1, feature(n)))
    if bias is None:
        return product
    biased = with_bias(product, bias)
    return None if biased is None else dataclasses.replace(product, content=biased)


@linears.at("Einsum")
def einsum(facts: Facts, node: ir.Node, a: ir.Value, b: ir.Value) -> Located | None:
    """``Einsum(x, w)`` with one contracted index, the weight constant or gathered by a router's choice."""
    equation = text_attribute(node, "equation", "").replace(" ", "")
    operands, _, result = equation.partition("->")
    terms = operands.split(",")
    if len(terms) != 2 or not result or "." in equation:
        return None
    for x, w, letters in ((a, b, terms), (b, a, terms[::-1])):
        weight = weight_of(facts, w, letters[1])
        if weight is None:
            continue
        data = operand(facts, x)
        if data is not None and weight[2] != "one":
            data = _tokens_behind(facts, data, x)
        return None if data is None else contract(data, weight, letters, result, (node, x))
    return None


def weight_of(facts: Facts, value: ir.Value, letters: str) -> tuple[Axes, View, By] | None:
    """The weight with its axes: [E, ..] constant or gathered, or of one expert."""
    located = facts.get(value, Located)
    if located is not None and isinstance(located.content, Stack):
        return located.axes, located.content.view, located.content.by
    view = _floatweight_of(facts, value)
    if view is None or view.rank not in (2, 3) or len(letters) != view.rank:
        return None
    axes = tuple((Atom("weight", Size(d), i),) for i, d in enumerate(view.shape))
    if view.rank == 2:
        return axes, view, "one"
    return ((Atom("expert", Size(view.shape[0])),), *axes[1:]), view, "all"


def contract(
    data: Located, weight: tuple[Axes, View, By], letters: list[str], result: str, at: tuple[ir.Node, ir.Value]
) -> Located | None:
    axes, view, by = weight
    if (len(letters[0]), len(letters[1])) != (data.rank, len(axes)) or len(set(letters[0])) != data.rank:
        return None
    x, w = dict(zip(letters[0], data.axes, strict=True)), dict(zip(letters[1], axes, strict=True))
    contracted = [letter for letter in x if letter in w and letter not in result]
    free = [letter for letter in w if letter not in x and only(w[letter], "weight")]
    over = [letter for letter in contracted if only(w[letter], "expert")]
    if len(contracted) == 2 and len(over) == 1:
        each = contract(data, weight, letters, over[0] + result, at)
        return None if each is None else summed(each, 0, at[0], keep=False)
    if len(contracted) != 1 or len(free) != 1 or set(result) != (set(x) | set(w)) - set(contracted):
        return None
    inner, outer = only(w[contracted[0]], "weight"), only(w[free[0]], "weight")
    k = only(x[contracted[0]], "feature")
    if inner is None or outer is None or k is None or k.size != inner.size or outer.size.constant is None:
        return None
    dims: dict[str, Axes] = {}
    for letter in result:
        both = unify((x.get(letter, ()),), (w.get(letter, ()),))
        if both is None:
            return None
        dims[letter] = both if letter != free[0] else (feature(outer.size.constant),)
    order = (outer.index, inner.index)
    held = apply(data.content, Dense(view.transpose(order if by == "one" else (0, *order))), by, *at)
    return None if held is None else Located(held, tuple(dims[letter][0] for letter in result))
