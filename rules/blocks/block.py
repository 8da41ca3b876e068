"""Reading a complete block: a router's experts, mixed; where one is not whole, what it lacks."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from rewriter.facts import Facts
from rewriter.graph.declines import NO_LOOP, WHOLE_BLOCK, reason_of
from rewriter.graph.walk import GaveUp, producers, walk
from rewriter.operators.form import is_experts
from rewriter.operators.moe import MOE
from rewriter.operators.qmoe import QMOE
from rewriter.rule import Declined, NotApplicable
from rewriter.rules.blocks.alike import same_expert
from rewriter.rules.blocks.axes import Axes, Located
from rewriter.rules.blocks.contents import Activated, Output, Router, Tokens
from rewriter.rules.blocks.mixing import Carried, Complete, Mixed, Mixing, Share, Start, Term, Weighted
from rewriter.rules.blocks.sums import content_of, is_term, on_hits, whole_sum
from rewriter.rules.blocks.unknown import why_unknown
from rewriter.tensors import View

_NEAR = 64


@dataclass(frozen=True)
class Block:
    """Every expert of a router, mixed.

    Attributes:
        out: the sum.
        axes: of the sum.
        mixing: the router's weights.
        experts: of expert 0, 1, ..: its weights.
        starts: what is added to the experts, each as large as the sum.
        numbers: of the experts that are there, where the router chooses among others too, which add nothing or what
            ``starts`` holds; else None.
    """

    out: ir.Value
    axes: Axes
    mixing: Mixing
    experts: tuple[Output, ...]
    starts: tuple[ir.Value, ...] = ()
    numbers: tuple[int, ...] | None = None

    @property
    def k(self) -> int:
        """Experts per token."""
        return min(self.mixing.router.k, len(self.experts))

    @property
    def x(self) -> ir.Value:
        """The tokens."""
        return self.experts[0].gate.x

    @property
    def beside(self) -> tuple[ir.Value, ...]:
        """What the block reads that is neither tokens nor router: what it adds, what it multiplies with."""
        times = self.mixing.times
        return self.starts if times is None else (*self.starts, times)

    @property
    def activation(self) -> Activated:
        """The function between the projections."""
        return self.experts[0].activation


def read_block(facts: Facts, out: ir.Value) -> Block:
    """Returns the block that ends in ``out``; declines, naming expert and node, where one is there but not whole."""
    located = whole_sum(facts, out)
    if located is None:
        raise NotApplicable
    if isinstance(located.content, Mixed):
        return _of_sum(facts, out, located.axes, located.content)
    assert isinstance(located.content, Complete)
    weighted = located.content.weighted
    return Block(out, located.axes, weighted.mixing, _of_all(facts, weighted))


def why_not_whole(facts: Facts, out: ir.Value) -> Declined | None:
    """Returns which experts the sum that ``out`` holds lacks; None where it lacks none.

    Raises:
        NotApplicable: its experts are fused already.
    """
    located = facts.get(out, Located)
    if located is None or not isinstance(located.content, Mixed):
        return None
    try:
        _of_sum(facts, out, located.axes, located.content)
    except Declined as declined:
        return declined
    return None


def _of_sum(facts: Facts, out: ir.Value, axes: Axes, mixed: Mixed) -> Block:
    """The block that a sum of experts is; declines where one is missing.

    Raises:
        Declined: one is.
        NotApplicable: all are fused already.
    """
    starts = tuple(start.value for start in mixed.starts())
    experts = _of_slots(mixed)
    if experts:
        return Block(out, axes, mixed.mixing, experts, starts)
    others = _others(facts, mixed)
    if _is_beside_fused(facts, mixed):
        raise NotApplicable
    found = _of_terms(facts, out, mixed, others)
    starts = (*starts, *(term.node.outputs[0] for term in others if isinstance(term, Term)))
    everyone = len(found) == mixed.mixing.router.experts
    return Block(out, axes, mixed.mixing, tuple(found.values()), starts, None if everyone else tuple(found))


def _others(facts: Facts, mixed: Mixed) -> list[Term | Start]:
    """What of a sum is a router's choice and no expert: the tokens as they are, a constant."""
    x = next((term.output.gate.x for term in mixed.terms() if term.output is not None), None)
    same = [term for term in mixed.terms() if term.output is None and _is_tokens(facts, term.value, x)]
    weighed = [start for start in mixed.starts() if _is_weighed(facts, start.value, mixed.mixing.router)]
    return [*same, *weighed]


def _is_beside_fused(facts: Facts, mixed: Mixed) -> bool:
    """Whether a sum is what stays beside experts that are fused: it starts from their operator, and adds its tokens."""
    terms = list(mixed.terms())
    if any(term.output is not None for term in terms):
        return False

    def before(at: ir.Value) -> list[ir.Value]:
        return [] if _is_fused(at) else producers(at)

    with contextlib.suppress(GaveUp):
        for at in walk([start.value for start in mixed.starts()], before, limit=_NEAR):
            node = at.producer()
            if node is not None and _is_fused(at) and node.inputs[0] is not None:
                x = _tokens_of(facts, node.inputs[0])
                if all(_is_tokens(facts, term.value, x) for term in terms):
                    return True
    return False


def _is_fused(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.op_type in (MOE.name, QMOE.name)


def _tokens_of(facts: Facts, x: ir.Value) -> ir.Value:
    """The tokens that an operator reads, before they were moved."""
    held = content_of(facts, x)
    return held.x if isinstance(held, Tokens) else x


def _is_tokens(facts: Facts, value: ir.Value, x: ir.Value | None) -> bool:
    located = facts.get(value, Located)
    return value is x or (located is not None and located.content == Tokens(x) if x is not None else False)


def _is_weighed(facts: Facts, value: ir.Value, router: Router) -> bool:
    """Whether a value is a constant times a weight of that router."""
    producer = value.producer()
    if producer is None or producer.op_type != "Mul":
        return False
    held = [located.content for v in producer.inputs if (located := facts.get(v, Located)) is not None]
    constant = any(facts.get(v, View) is not None for v in producer.inputs)
    return constant and any(isinstance(each, Share) and each.mixing.router == router for each in held)


def _of_terms(facts: Facts, out: ir.Value, mixed: Mixed, others: Sequence[Term | Start] = ()) -> dict[int, Output]:
    """The experts of a sum by their numbers: all of the router's, but where it has others, which are no experts."""
    router = mixed.mixing.router
    found: dict[int, Output] = {}
    slots: dict[int, frozenset[int]] = {}
    terms = [(term.expert, term) for term in mixed.terms() if term.expert is not None and term not in others]
    unknown = [pair for pair in terms if pair[1].output is None]
    if unknown:
        expert, first = min(unknown, key=lambda pair: pair[0])
        reason, culprit = why_unknown(facts, first.value, first.node)
        if is_experts(culprit):  # a gate of what is fused already
            raise NotApplicable
        raise Declined(f"expert {expert}: {reason}", culprit, remedy=reason_of(reason).remedy)
    for expert, term in terms:
        assert term.output is not None
        counted = slots.get(expert, frozenset())
        if counted & term.slots:
            raise Declined(f"expert {expert} is mixed in twice", term.node, remedy=WHOLE_BLOCK)
        if not same_expert(found.setdefault(expert, term.output), term.output):
            raise Declined(f"expert {expert} is another one in another slot", term.node)
        slots[expert] = counted | term.slots
    for expert in range(router.experts):
        if expert not in found and others:
            continue
        if expert not in found:
            _decline_conditional(mixed)
            _decline_unknown(facts, out, mixed)
            raise Declined(f"expert {expert} of {router.experts} is missing", _last(mixed).node, remedy=WHOLE_BLOCK)
        if len(slots[expert]) != router.k:
            reason = f"expert {expert} is mixed in for {len(slots[expert])} of {router.k} slots"
            raise Declined(reason, _last(mixed).node, remedy=WHOLE_BLOCK)
    if max(found) >= router.experts:
        raise Declined(f"expert {max(found)} is mixed in, and the router has {router.experts}", _last(mixed).node)
    found = dict(sorted(found.items()))
    lowest, leading = next(iter(found.items()))
    for expert, output in found.items():
        if output.gate.x is not leading.gate.x:
            raise Declined(f"expert {expert} reads another input than expert {lowest}", output.gate.x)
        if output.activation != leading.activation:
            raise Declined(f"expert {expert} has another activation than expert {lowest}", _last(mixed).node)
    return found


def _of_slots(mixed: Mixed) -> tuple[Output, ...]:
    """The experts of a sum with one term for each slot; none of another sum."""
    terms = list(mixed.terms())
    first, router = terms[0], mixed.mixing.router
    if first.expert is not None or first.output is None:
        return ()
    for slot in range(router.k):
        found = [term for term in terms if slot in term.slots]
        if len(found) != 1:
            how = "missing" if not found else "mixed in twice"
            raise Declined(f"slot {slot} of {router.k} is {how}", found[-1].node if found else first.node)
        output = found[0].output
        if output is None or output.of(router) != first.output.of(router):
            raise Declined(f"slot {slot} has other experts than slot 0", found[0].node)
    return _each(first.output, router, first.node)


def _decline_conditional(mixed: Mixed) -> None:
    """Declines where the experts of one sum are in several graphs.

    Raises:
        Declined: they are.
    """
    for term in mixed.terms():
        if term.node.graph is not mixed.mixing.router.node.graph:
            reason = f"an If decides whether expert {term.expert} is added, which no operator asks"
            raise Declined(reason, term.node, remedy=NO_LOOP)


def _decline_unknown(facts: Facts, out: ir.Value, mixed: Mixed) -> None:
    """Declines for what is known of why a sum does not go on, or of what it starts from: an expert that is not known.

    Raises:
        Declined: that is known.
        NotApplicable: the sum of what comes before says so.
    """
    for start in mixed.starts():
        producer = start.value.producer()
        if producer is None:
            continue
        held = content_of(facts, start.value)
        if isinstance(held, Carried) and isinstance(held.share.content, Share):
            reason, culprit = why_unknown(facts, held.features.factors[0].linear.x, start.node)
            raise Declined(f"expert {held.share.content.expert}: {reason}", culprit, remedy=reason_of(reason).remedy)
        before = [value for value in producer.inputs if value is not None and _is_sum(facts, value)]
        if any((held := content_of(facts, value)) is not None and not is_term(value, held) for value in before):
            raise NotApplicable
        if reason := facts.why_not(start.value):
            raise Declined(reason, producer, remedy=reason.remedy)
    for use in out.uses():
        for value in (*use.node.inputs, *use.node.outputs):
            if reason := facts.why_not(value):
                producer = None if value is None else value.producer()
                raise Declined(reason, producer or use.node, remedy=reason.remedy)


def _is_sum(facts: Facts, value: ir.Value | None) -> bool:
    located = facts.get(value, Located)
    return located is not None and isinstance(located.content, Mixed) and not on_hits(located)


def _last(mixed: Mixed) -> Term:
    return list(mixed.terms())[-1]


def _of_all(facts: Facts, weighted: Weighted) -> tuple[Output, ...]:
    output = weighted.output
    router = weighted.mixing.router
    if output is None:
        reason, culprit = why_unknown(facts, weighted.value, weighted.node)
        raise Declined(f"the experts: {reason}", culprit, remedy=reason_of(reason).remedy)
    return _each(output, router, weighted.node)


def _each(output: Output, router: Router, node: ir.Node) -> tuple[Output, ...]:
    """The output of each expert, from that of all or of the chosen ones."""
    count = output.gate.weight.stack_size
    if count != router.experts:
        reason = f"the router chooses among {router.experts} experts, and there are weights of {count}"
        raise Declined(reason, node, remedy=WHOLE_BLOCK)
    return tuple(output.expert(position) for position in range(count))


def require_alike(views: Sequence[View | None], what: str, node: ir.Node) -> bool:
    """Whether there are views, of one shape and dtype; declines where experts differ in them."""
    present = [view for view in views if view is not None]
    if not present:
        return False
    for expert, view in enumerate(views):
        if view is None:
            raise Declined(f"expert {expert} has no {what}, and others have", node)
        if (view.shape, view.dtype) != (present[0].shape, present[0].dtype):
            raise Declined(f"{what} of expert {expert} is {list(view.shape)}, of others {list(present[0].shape)}", node)
    return True
