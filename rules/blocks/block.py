"""What the rules that fuse a block share: reading a complete one, its router, and the nodes that make it up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import onnx_ir as ir

from rewriter.facts import Facts
from rewriter.graph.declines import WHOLE_BLOCK, reason_of
from rewriter.rule import Declined, NotApplicable
from rewriter.rules.blocks.axes import Axes, Located
from rewriter.rules.blocks.contents import Activated, Output
from rewriter.rules.blocks.mixing import Complete, Mixed, Mixing, Term, Weighted
from rewriter.tensors import View


@dataclass(frozen=True)
class Block:
    """Every expert of a router, mixed.

    Attributes:
        out: the sum.
        axes: of the sum.
        mixing: the router's weights.
        experts: of expert 0, 1, ..: its weights.
        starts: what is added to the experts, each as large as the sum.
    """

    out: ir.Value
    axes: Axes
    mixing: Mixing
    experts: tuple[Output, ...]
    starts: tuple[ir.Value, ...] = ()

    @property
    def x(self) -> ir.Value:
        """The tokens."""
        return self.experts[0].gate.x

    @property
    def activation(self) -> Activated:
        """The function between the projections."""
        return self.experts[0].activation


@dataclass(frozen=True)
class Routing:
    """What selects and mixes, as com.microsoft::MoE and QMoE have it.

    Attributes:
        logits: [.., E] what selects.
        function: ``logits``, or ``log_sigmoid`` of them.
        normalize: whether the weights of the chosen are made to add up to one.
        weights: [.., E] the scores that mix, where no function of the logits does; only QMoE takes them.
        given: [.., k] the weights of the chosen, where an operator is to take them as they are.
        total: [.., k] what the output has to be multiplied with the sum of, or None.
    """

    logits: ir.Value
    function: Literal["logits", "log_sigmoid"]
    normalize: bool
    weights: ir.Value | None = None
    given: ir.Value | None = None
    total: ir.Value | None = None

    @property
    def read(self) -> tuple[ir.Value, ...]:
        """What the block reads beside the tokens."""
        return tuple(value for value in (self.logits, self.weights, self.given) if value is not None)


def read_block(facts: Facts, out: ir.Value) -> Block:
    """Returns the block that ends in ``out``; declines, naming expert and node, where one is there but not whole."""
    located = facts.get(out, Located)
    held = None if located is None or on_hits(located) else located.content
    if located is None:
        _decline_start(facts, out)
    if located is None or not isinstance(held, Mixed | Complete) or _goes_on(facts, out, held):
        raise NotApplicable
    if isinstance(held, Mixed):
        experts = _of_terms(facts, out, held)
        return Block(out, located.axes, held.mixing, experts, tuple(start.value for start in held.starts()))
    weighted = held.weighted
    return Block(out, located.axes, weighted.mixing, _of_all(facts, weighted))


def on_hits(located: Located) -> bool:
    """Whether a content is that of the rows of one expert."""
    return any(atom.kind == "group" for dim in located.axes for atom in dim)


def _goes_on(facts: Facts, out: ir.Value, held: Mixed | Complete) -> bool:
    """Whether the sum is part of a longer one, or the same sum that was only moved."""
    producer = out.producer()
    if isinstance(held, Complete) and any(
        use.node.op_type == "Cast" and _is_end(facts, use.node) for use in out.uses()
    ):
        return True
    inputs = () if producer is None or _is_end(facts, producer) else producer.inputs
    if any(_holds(facts, value, held) for value in inputs):
        return True
    pending = [out]
    while pending:
        for use in pending.pop().uses():
            for value in use.node.outputs:
                located = facts.get(value, Located)
                if located is None or not isinstance(located.content, Mixed):
                    continue
                if isinstance(held, Mixed) and located.content is not held:
                    return located.content.mixing.router == held.mixing.router
                pending.append(value)
    return False


def _is_end(facts: Facts, node: ir.Node) -> bool:
    """Whether a node casts a sum, computed in float32, back to the type of what it is a sum of."""
    located = facts.get(node.outputs[0], Located)
    return node.op_type == "Cast" and located is not None and isinstance(located.content, Complete)


def _holds(facts: Facts, value: ir.Value | None, held: Mixed | Complete) -> bool:
    located = facts.get(value, Located)
    return located is not None and located.content is held


def _of_terms(facts: Facts, out: ir.Value, mixed: Mixed) -> tuple[Output, ...]:
    router = mixed.mixing.router
    found: dict[int, Output] = {}
    slots: dict[int, frozenset[int]] = {}
    terms = list(mixed.terms())
    unknown = [term for term in terms if term.output is None]
    if unknown:
        first = min(unknown, key=lambda term: term.expert)
        reason, culprit = _why(facts, first.value, first.node)
        raise Declined(f"expert {first.expert}: {reason}", culprit)
    for term in terms:
        assert term.output is not None
        counted = slots.get(term.expert, frozenset())
        if counted & term.slots:
            raise Declined(f"expert {term.expert} is mixed in twice", term.node, remedy=WHOLE_BLOCK)
        if found.setdefault(term.expert, term.output) != term.output:
            raise Declined(f"expert {term.expert} is another one in another slot", term.node)
        slots[term.expert] = counted | term.slots
    for expert in range(router.experts):
        if expert not in found:
            _decline_unknown(facts, out, mixed)
            raise Declined(f"expert {expert} of {router.experts} is missing", _last(mixed).node, remedy=WHOLE_BLOCK)
        if len(slots[expert]) != router.k:
            reason = f"expert {expert} is mixed in for {len(slots[expert])} of {router.k} slots"
            raise Declined(reason, _last(mixed).node, remedy=WHOLE_BLOCK)
    if len(found) != router.experts:
        raise Declined(f"expert {max(found)} is mixed in, and the router has {router.experts}", _last(mixed).node)
    experts = tuple(found[expert] for expert in range(router.experts))
    for expert, output in enumerate(experts):
        if output.gate.x is not experts[0].gate.x:
            raise Declined(f"expert {expert} reads another input than expert 0", output.gate.x)
        if output.activation != experts[0].activation:
            raise Declined(f"expert {expert} has another activation than expert 0", _last(mixed).node)
    return experts


def _decline_start(facts: Facts, out: ir.Value) -> None:
    """Declines, once for a block, where its first expert is added to something that it cannot be a part of."""
    node = out.producer()
    for value in () if node is None or node.op_type != "Add" else node.inputs:
        located = facts.get(value, Located)
        held = None if located is None else located.content
        if isinstance(held, Mixed) and not held.complete and next(held.terms()).expert == 0:
            raise Declined("what the first expert is added to is not as large as it", node, remedy=WHOLE_BLOCK)


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
        if any(_is_sum(facts, value) for value in producer.inputs):
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
        reason, culprit = _why(facts, weighted.value, weighted.node)
        raise Declined(f"the experts: {reason}", culprit, remedy=reason_of(reason).remedy)
    count = output.gate.weight.stack_size
    if count != router.experts:
        reason = f"the router chooses among {router.experts} experts, and there are weights of {count}"
        raise Declined(reason, weighted.node, remedy=WHOLE_BLOCK)
    return tuple(output.expert(position) for position in range(count))


_FAR = 64


def _why(facts: Facts, value: ir.Value, node: ir.Node) -> tuple[str, ir.Node]:
    """Why a value is not known to be an expert's output: the nearest reason, or operator that is not understood."""
    pending, seen = [value], {value}
    unknown: ir.Node | None = None
    for _ in range(_FAR):
        if not pending:
            break
        at = pending.pop(0)
        producer = at.producer()
        if producer is None:
            continue
        if reason := facts.why_not(at):
            return reason, producer
        if facts.get(at, Located) is not None:
            continue
        unknown = producer
        fresh = [v for v in producer.inputs if v is not None and v not in seen and facts.get(v, View) is None]
        seen.update(fresh)
        pending.extend(fresh)
    if unknown is None:
        return "what is mixed is not the output of an expert of that router", node
    return f"{unknown.op_type} does not belong to an expert as com.microsoft::MoE has it", unknown


def resolve(mixing: Mixing, node: ir.Node) -> Routing:
    """Returns how the operators select and mix as ``mixing`` does, or declines: they have no such routing."""
    if fault := mixing.router.fault or mixing.fault:
        raise Declined(f"the router: {fault}", mixing.router.node, remedy=reason_of(fault).remedy)
    selected, scores = mixing.router.scores, mixing.scores
    if scores.logits is not selected.logits:
        if mixing.stage == "softmax":
            raise Declined("the weights are a softmax over other scores than those that select", node)
        return Routing(selected.logits, "logits", mixing.stage == "normalised", mixing.dense)
    if mixing.stage == "softmax":
        return Routing(selected.logits, "logits", normalize=True)
    if scores.function == "softmax":
        return Routing(selected.logits, "logits", mixing.stage == "normalised")
    if mixing.stage == "normalised" and scores.function == "sigmoid":
        return Routing(selected.logits, "log_sigmoid", normalize=True)
    if mixing.late:
        raise Declined(
            f"the weights are the {scores.function} of the chosen logits, which is no value of all experts", node
        )
    return Routing(mixing.dense, "logits", mixing.stage == "normalised", mixing.dense)


def resolve_given(facts: Facts, mixing: Mixing) -> Routing | None:
    """Returns the routing with the weights as they are, where no function of the logits tells them; else None.

    Selected by biased scores and mixed by others, as by DeepSeek-V3; a sum of weights that is bounded or enlarged.
    """
    scores, value = mixing.scores, mixing.value
    direct = scores.logits is mixing.router.scores.logits and (
        mixing.stage == "softmax" or scores.function == "softmax" or (mixing.stage, scores.function) == _NORMALISED
    )
    if mixing.router.fault or value is None or not mixing.positive or (direct and mixing.opaque is None):
        return None
    if mixing.fault and mixing.opaque is None:
        return None
    located = facts.get(value, Located)
    chosen = facts.get(mixing.router.indices, Located)
    if located is None or chosen is None or located.axes != chosen.axes:
        return None
    return Routing(mixing.router.scores.logits, "logits", normalize=True, given=value, total=value)


def normalised(facts: Facts, mixing: Mixing, routing: Routing) -> Routing | None:
    """Returns the routing with weights that add up to one, and what they did add up to; None where that is not told."""
    if routing.normalize or routing.weights is not None or mixing.table is not None or mixing.value is None:
        return None
    located, chosen = facts.get(mixing.value, Located), facts.get(mixing.router.indices, Located)
    if located is None or chosen is None or located.axes != chosen.axes:
        return None
    return replace(routing, normalize=True, total=mixing.value)


_NORMALISED = ("normalised", "sigmoid")


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
