"""Combines: the weight that a router gives an expert, the weighted expert, and the sum of all.

Facts stated: ``Located`` with content ``Mask``, ``Share``, ``Mixed``, ``Weighted`` or ``Complete``. Masks and sums over
slots, slot by slot, one-hot or scattered columns, chosen rows and all experts at once end in the same few contents.
Source: transformers' eager experts and batched_mm, mobius' unrolled blocks, dense bmm as torch.onnx writes them.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from rewriter.facts import Facts, Family
from rewriter.facts.integers import static
from rewriter.facts.shapes import shape_of
from rewriter.facts.size import ONE
from rewriter.graph.attributes import integer_attribute, text_attribute
from rewriter.graph.walk import readers
from rewriter.rules.blocks.axes import Axes, Content, Located, Uniform, only, put, total, unify
from rewriter.rules.blocks.contents import Features, Output, Router, Slot, Tokens
from rewriter.rules.blocks.laws import of_any, of_number, of_two
from rewriter.rules.blocks.masks import chosen_scores, every_score, experts_dim
from rewriter.rules.blocks.mixing import (
    Admitted,
    Carried,
    Chosen,
    Complete,
    Every,
    Filled,
    Mask,
    Mixed,
    Mixing,
    Share,
    Sparse,
    Start,
    Term,
    Total,
    Unmasked,
    Weighted,
    unit,
)
from rewriter.rules.blocks.movement import token_rows
from rewriter.rules.blocks.routers import last_axis
from rewriter.rules.blocks.routing_weights import faulty, summed_weights
from rewriter.rules.blocks.uniform import NOTHING
from rewriter.tensors import View

combines = Family("combines")


def of_choice(mixing: Mixing, router: Router) -> Mixing | None:
    """Returns weights as those of a choice that was made of the one that they are of; None where it was not."""
    same = mixing.router == router or router.made == (mixing.router,)
    return dataclasses.replace(mixing, router=router) if same else None


@of_two.at("Mul")
def mask_weights(a: Located, b: Located, node: ir.Node) -> Share | None:
    """Returns weights times the mask of an expert."""
    return masked(a.content, b.content, node)


def masked(a: Content, b: Content, node: ir.Node) -> Share | None:
    """Returns weights times the mask of an expert."""
    if not isinstance(a, Mixing) or not isinstance(b, Mask) or b.whole:
        return None
    own = of_choice(a, b.router)
    if own is None or a.slot != b.slot:
        a = faulty(a, "a weight is masked by the choice of another slot or router", node)
    else:
        a = own
    slots = None if a.slot is None else frozenset({a.slot})
    return Share(dataclasses.replace(a, slot=None), b.expert, slots)


@of_any.at("Mul")
def count_slots(facts: Facts, value: ir.Value, a: Located | None, b: Located, node: ir.Node) -> Located | None:
    """Returns as ``count``, of a mask that has a slot index, of one slot."""
    mask = b.content
    if a is None or not isinstance(mask, Mask) or mask.router.k != 1 or not b.rank or not only(b.axes[-1], "slot"):
        return None
    own = Located(mask.fix(b.axes[-1][0], 0) or mask, put(b.axes, b.rank - 1, ()))
    held, axes = count(a, own, node), unify(a.axes, own.axes)
    return None if held is None or axes is None else Located(held, axes)


@of_any.at("Mul")
def weigh(facts: Facts, value: ir.Value, a: Located | None, b: Located, node: ir.Node) -> Located | None:
    """Returns anything times a mask, a share or weights."""
    every = every_score(facts, value) if isinstance(b.content, Mask) and b.content.expert is None else None
    every = a if a is not None and isinstance(a.content, Every) else every
    if every is not None and (axes := unify(every.axes, b.axes)) and (share := chosen_scores(every, b, node)):
        return Located(share, axes)
    if isinstance(b.content, Mask) and a is None:
        return _admitted(facts, value, b, node) or Located(masked_unknown(b.content, node), b.axes)
    if not isinstance(b.content, Share | Mixing):
        return None
    rows = a or token_rows(facts, value) or token_rows(facts, node.outputs[0])
    axes = b.axes if rows is None else unify(rows.axes, b.axes)
    if axes is None and _has_slots(b.content) and only(b.axes[-1], "slot"):
        own = Located(b.content.fix(b.axes[-1][0], 0) or b.content, put(b.axes, b.rank - 1, ()))
        return weigh(facts, value, a, own, node)
    if rows is not None and (axes is None or a is None) and any(only(dim, "group") for dim in b.axes):
        a, axes = None, (*b.axes[:1], *rows.axes[1:])  # rows of something else than that expert's
    mixed = None if axes is None else weighted(value, a, b, node)
    if mixed is None or axes is None:
        return None
    alone = isinstance(mixed, Mixed) and mixed.mixing.router.k == 1  # then the slot is no index
    return Located(mixed, tuple(() if alone and only(dim, "slot") else dim for dim in axes))


def _has_slots(held: Mixing | Share) -> bool:
    """Whether there is a slot index, of one slot."""
    slots = held.slot if isinstance(held, Mixing) else held.slots
    return slots is None and (held if isinstance(held, Mixing) else held.mixing).router.k == 1


def _admitted(facts: Facts, value: ir.Value, mask: Located, node: ir.Node) -> Located | None:
    """Returns tokens that are nothing where they did not choose an expert, on their way to its weights."""
    rows, held = token_rows(facts, value), mask.content
    if rows is None or not isinstance(held, Mask) or held.expert is None or not mask.rank or mask.axes[-1]:
        return None
    beside = [v for n in readers(node.outputs[0]) for v in n.inputs if v is not None and v not in node.outputs]
    fits = total(rows.axes[-1]) != ONE and unify(rows.axes, mask.axes) == rows.axes
    return Located(Admitted(value, held), rows.axes) if fits and all(facts.get(v, View) for v in beside) else None


def masked_unknown(mask: Mask, node: ir.Node) -> Share:
    """Returns the share that something other than a router's weights gives an expert."""
    unknown = Mixing(mask.router, mask.router.scores, mask.router.scores.logits)
    mixing = faulty(unknown, "what is masked is not the router's weights", node)
    return Share(mixing, mask.expert, None if mask.slot is None else frozenset({mask.slot}))


def weighted(value: ir.Value, output: Located | None, share: Located, node: ir.Node) -> Content | None:
    """Returns an expert's output times its share; of an unknown output, what is known of the product."""
    held = None if output is None else output.content
    if isinstance(held, Features):
        return Carried(held, share)
    known = held if isinstance(held, Output) else None
    weight = share.content
    if held is not None and known is None:
        return None
    if known is not None and isinstance(known.gate.share, Mask):
        found = _of_admitted(known.gate.share, weight, node)
        if found is None or found.slots is None:
            return None
        if found.expert is None:
            return Weighted(found.mixing, known.plain(), value, "expert", node)
        return Mixed(found.mixing, (Term(found.expert, found.slots, known.plain(), value, node),))
    if isinstance(weight, Share) and weight.slots is not None:
        if weight.expert is not None:
            own = known if known is None or known.by == "one" else None
            return Mixed(weight.mixing, (Term(weight.expert, weight.slots, own, value, node),))
        own = known if known is None or known.by == "all" else None
        return Weighted(weight.mixing, own, value, "expert", node) if weight.complete else None
    if isinstance(weight, Mixing) and weight.router.k == 1 and known is not None and known.by == Slot(weight.router, 0):
        weight = dataclasses.replace(weight, slot=0)
    if isinstance(weight, Mixing) and weight.slot is not None and known is not None:
        if known.by == "one":
            return Unmasked(weight, known, value, node)
        if known.by != Slot(weight.router, weight.slot):
            return None
        mixing = dataclasses.replace(weight, slot=None)
        return Mixed(mixing, (Term(None, frozenset({weight.slot}), known, value, node),))
    by_row = any(atom.kind in ("slot", "row") for dim in share.axes for atom in dim)
    alone = isinstance(weight, Mixing) and weight.router.k == 1 and not by_row
    rows = (by_row or alone) and not share.axes[-1]
    if isinstance(weight, Mixing) and weight.slot is None and rows:
        by = None if known is None else known.by
        of_that = of_choice(weight, by) if isinstance(by, Router) else None
        if of_that is not None:
            mixed = Weighted(of_that, known, value, "slot", node)
            return Complete(mixed) if alone else mixed
        return Weighted(weight, None, value, "slot", node)
    return None


def _of_admitted(mask: Mask, weight: Content, node: ir.Node) -> Share | None:
    """Returns the share of an expert that read nothing where it was not chosen: then it returned nothing either."""
    share = masked(weight, mask, node) if isinstance(weight, Mixing) else weight
    if not isinstance(share, Share) or (share.mixing.router, share.expert) != (mask.router, mask.expert):
        return None
    seen = frozenset(range(mask.router.k) if mask.slot is None else {mask.slot})
    return share if share.slots is not None and share.slots <= seen else None


@of_two.at("Mul")
def mask_weighted(a: Located, b: Located, node: ir.Node) -> Mixed | None:
    """Returns an expert's output times a slot's weight, where the slot holds that expert."""
    held, mask = a.content, b.content
    share = masked(held.mixing, mask, node) if isinstance(held, Unmasked) else None
    if not isinstance(held, Unmasked) or share is None or share.expert is None or share.slots is None:
        return None
    return Mixed(share.mixing, (Term(share.expert, share.slots, held.output, held.value, held.node),))


@of_two.at("Mul")
def count(a: Located, b: Located, node: ir.Node) -> Mixed | None:
    """Returns an expert's output where it is the one that was chosen: with a weight of one."""
    held, value = a.content, next((v for v in node.inputs if v is not None), None)
    if not isinstance(held, Output) or held.gate.share is not None or held.by != "one" or value is None:
        return None
    return _once(held, b.content, value, node)


def _once(held: Output, mask: Content | None, value: ir.Value, node: ir.Node) -> Mixed | None:
    """The output of the one expert of each token, where a mask holds."""
    if not isinstance(mask, Mask) or mask.expert is None or mask.slot is None or mask.router.k != 1:
        return None
    router = mask.router
    return Mixed(unit(router), (Term(mask.expert, frozenset({mask.slot}), held, value, node),))


@of_two.at("Mul")
def admit(a: Located, b: Located, node: ir.Node) -> Admitted | None:
    """Returns tokens times the weights of every expert, or the mask of one."""
    held, share = a.content, b.content
    if isinstance(held, Tokens) and isinstance(share, Mask) and not b.axes[-1]:
        return Admitted(held.x, share) if share.expert is not None or share.whole else None
    if not isinstance(held, Tokens) or not isinstance(share, Share) or share.expert is not None or not share.complete:
        return None
    return Admitted(held.x, dataclasses.replace(share, mixing=dataclasses.replace(share.mixing, before=True)))


@of_two.at("Add")
def add_sums(first: Located, second: Located, node: ir.Node) -> Content | None:
    """Returns the sum of two sums of experts, or of two shares of one expert."""
    a, b = _alone(first.content, node), _alone(second.content, node)
    if isinstance(a, Mixed) and isinstance(b, Mixed):
        if a.complete and b.complete:  # two blocks with one router
            return None
        return Mixed(a.mixing if a.mixing.fault else b.mixing, (a, b)) if a.mixing == b.mixing else None
    if not isinstance(a, Share) or not isinstance(b, Share) or (a.mixing, a.expert) != (b.mixing, b.expert):
        return None
    if a.slots is None or b.slots is None or a.slots & b.slots:
        return None
    return dataclasses.replace(a if a.mixing.fault else b, slots=a.slots | b.slots)


def _alone(held: Content, node: ir.Node) -> Content:
    """The output of an expert that read nothing where it was not chosen, or of the chosen, as what it adds to a sum."""
    if isinstance(held, Filled):
        return held.summed(node) or held
    value = node.outputs[0]
    mask = held.gate.share if isinstance(held, Output) and held.by == "one" else None
    return held if not isinstance(held, Output) or mask is None else _once(held.plain(), mask, value, node) or held


@of_number.at("Mul", "Div")
def scale_sum(first: Located, number: float, node: ir.Node) -> Mixed | None:
    """Returns some of the experts, summed, times a number, where they are added to nothing else."""
    held = first.content
    if not isinstance(held, Mixed) or held.complete or not number or held.begun:
        return None
    factor = number if node.op_type == "Mul" else 1 / number
    return Mixed(dataclasses.replace(held.mixing, scale=held.mixing.scale * factor, value=None), (held,))


@of_any.at("Mul")
def scale_tokens(facts: Facts, value: ir.Value, a: Located | None, b: Located, node: ir.Node) -> Located | None:
    """Returns some of the experts, summed, times one number of each token, as a router of groups weighs its experts."""
    held, dims = b.content, shape_of(facts, value)
    if not isinstance(held, Mixed) or held.complete or held.begun or held.mixing.times is not None or not dims:
        return None
    own = ((ONE,) * (b.rank - len(dims)) + dims)[:-1]
    fits = all(size in (ONE, total(dim)) for size, dim in zip(own, b.axes, strict=False))
    if len(dims) > b.rank or dims[-1] != ONE or not fits or not only(b.axes[-1], "feature"):
        return None
    return Located(Mixed(dataclasses.replace(held.mixing, times=value), (held,)), b.axes)


@of_any.at("Add")
def begin(facts: Facts, value: ir.Value, a: Located | None, b: Located, node: ir.Node) -> Located | None:
    """Returns a sum of some experts plus what it starts from."""
    other = next((v for v in node.inputs if v is not None and v is not value), None)
    if not isinstance(b.content, Mixed) or other is None or len(other.uses()) > 1:
        return None
    return started(facts, value, a, b, node)


def started(facts: Facts, value: ir.Value, a: Located | None, b: Located, node: ir.Node) -> Located | None:
    """Returns a sum that is not complete yet and what it starts from, where that lies as the sum does."""
    held = b.content
    axes = [located.axes for located in (a, token_rows(facts, value)) if located is not None]
    if not isinstance(held, Mixed) or held.complete or b.axes not in axes:
        return None
    return Located(Mixed(held.mixing, (Start(value, node), held)), b.axes)


@combines.at("ScatterElements")
def scatter_elements(
    facts: Facts, node: ir.Node, zeros: ir.Value, chosen: ir.Value, weights: ir.Value
) -> Located | None:
    """Weights written into zeros [.., E] where their experts are: the share of every expert."""
    seed, index, values = (facts.get(v, Located) for v in (zeros, chosen, weights))
    if seed is None or index is None or values is None:
        return None
    held, mixing = index.content, values.content
    if not isinstance(held, Chosen) or not isinstance(mixing, Mixing) or held.router != mixing.router:
        return None
    router = held.router
    wide = (*index.axes[:-1], experts_dim(router.experts))
    plain = text_attribute(node, "reduction", "none") in ("none", "add")
    aligned = index.rank > 0 and index.axes == values.axes and bool(only(index.axes[-1], "slot"))
    if not aligned or not last_axis(node, index.rank, 0):
        return None
    same = seed.rank == len(wide) and all(total(a) == total(b) for a, b in zip(seed.axes, wide, strict=True))
    if not plain or held.slot is not None or not same:
        return None
    if isinstance(seed.content, Uniform) and seed.content.value <= NOTHING:
        return Located(Sparse(mixing), wide) if text_attribute(node, "reduction", "none") == "none" else None
    if seed.content != Uniform(0.0):
        return None
    return Located(Share(mixing, None, frozenset(range(router.k))), wide)


@combines.at("ReduceSum")
def reduce_sum(facts: Facts, node: ir.Node, data: ir.Value, *others: ir.Value | None) -> Located | None:
    """The sum over slots or over experts."""
    located = facts.get(data, Located)
    if located is None or not located.rank:
        return None
    axes = static(facts, node, 1, "axes", [])
    keep = integer_attribute(node, "keepdims", 1)
    if axes is None or len(axes) != 1 or keep not in (0, 1):
        return None
    return summed(located, axes[0] % located.rank, node, keep=bool(keep))


def summed(located: Located, axis: int, node: ir.Node, *, keep: bool) -> Located | None:
    """Returns the sum over one dimension."""
    held = located.content
    left = put(located.axes, axis, *([()] if keep else []))
    if isinstance(held, Mixing):
        return summed_weights(located, axis, keep=keep)
    if isinstance(held, Share) and held.expert is None and only(located.axes[axis], "expert"):
        return _over_experts(held, left, node)
    if isinstance(held, Share) and held.slots is None and only(located.axes[axis], "slot"):
        everything = frozenset(range(held.mixing.router.k))
        return Located(dataclasses.replace(held, slots=everything), left)
    if isinstance(held, Output) and isinstance(held.gate.share, Share) and only(located.axes[axis], "expert"):
        value, plain = node.inputs[0], held.plain()
        assert value is not None
        return Located(Complete(Weighted(held.gate.share.mixing, plain, value, "expert", node)), left)
    if isinstance(held, Mixed) and only(located.axes[axis], "slot"):  # each pair of token and slot has one expert
        return Located(Mixed(held.mixing, (held,)), left)
    if isinstance(held, Mixed | Complete) and not located.axes[axis]:
        return Located(held, left)
    if isinstance(held, Weighted) and only(located.axes[axis], held.over):
        return Located(Complete(held), left)
    return None


def _over_experts(held: Share, axes: Axes, node: ir.Node) -> Located | None:
    """The sum of every expert's share: of all slots, of one, or of each."""
    slots, k = held.slots, held.mixing.router.k
    if slots is not None and len(slots) > 1:
        return Located(Total(held.mixing), axes) if held.complete else None
    slot = None if slots is None else next(iter(slots))
    out = node.outputs[0] if slot is None or k == 1 else None
    return Located(dataclasses.replace(held.mixing, slot=slot, value=out), axes)
