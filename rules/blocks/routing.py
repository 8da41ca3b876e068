"""What the operators compute of a router: logits that select, weights that mix, and what is left to do around them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import onnx_ir as ir

from rewriter.facts import Facts
from rewriter.graph.attributes import cast_type
from rewriter.graph.declines import reason_of
from rewriter.graph.walk import producers, walk
from rewriter.rule import Declined
from rewriter.rules.blocks.axes import Located
from rewriter.rules.blocks.block import Block
from rewriter.rules.blocks.mixing import Mixing

_NORMALISED = ("normalised", "sigmoid")
_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


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
        before: [.., 1] what the tokens have to be multiplied with, or None.
    """

    logits: ir.Value
    function: Literal["logits", "log_sigmoid"]
    normalize: bool
    weights: ir.Value | None = None
    given: ir.Value | None = None
    total: ir.Value | None = None
    before: ir.Value | None = None

    @property
    def read(self) -> tuple[ir.Value, ...]:
        """What the block reads beside the tokens."""
        return tuple(value for value in (self.logits, self.weights, self.given, self.before) if value is not None)


def resolve(mixing: Mixing, node: ir.Node) -> Routing:
    """Returns how the operators select and mix as ``mixing`` does, or declines: they have no such routing."""
    if fault := mixing.router.fault or mixing.fault:
        raise Declined(f"the router: {fault}", mixing.router.node, remedy=reason_of(fault).remedy)
    selected, scores = mixing.router.scores, mixing.scores
    if mixing.before:
        if mixing.router.k != 1:
            raise Declined("the tokens are multiplied by the weights of several experts before them", node)
        return Routing(selected.logits, "logits", normalize=True, before=mixing.value or mixing.router.node.outputs[0])
    if mixing.stage == "unit":
        if mixing.router.experts == 1:
            raise Declined(
                "there is one expert that nothing weighs: a logit of minus infinity would leave it out", node
            )
        return Routing(selected.logits, "logits", normalize=True)
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


def resolve_given(facts: Facts, block: Block, dtype: ir.DataType, *, factors: bool = False) -> Routing | None:
    """Returns the routing with the weights as they are, where no function of the logits tells them; else None.

    Selected by biased scores and mixed by others, as by DeepSeek-V3; a sum of weights that is bounded or enlarged;
    in half precision also logits that a cast would round, and with them the choice, and factors.

    Args:
        facts: what is known.
        block: what is mixed.
        dtype: element type of x.
        factors: whether the experts' weights take factors, rounding.
    """
    mixing = block.mixing
    scores, value = mixing.scores, mixing.value
    direct = scores.logits is mixing.router.scores.logits and (
        mixing.stage in ("softmax", "unit")
        or scores.function == "softmax"
        or (mixing.stage, scores.function) == _NORMALISED
    )
    direct = direct and (mixing.router.selects or bool(mixing.router.made))
    rounds = not factors and (mixing.table is not None or mixing.scale != 1)
    rounds = rounds or computed_in(mixing.router.scores.logits) == ir.DataType.FLOAT
    direct = direct and not (dtype in _HALVES and rounds) and block.numbers is None
    if (
        mixing.before
        or mixing.router.fault
        or value is None
        or not mixing.positive
        or (direct and mixing.opaque is None)
    ):
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


def computed_in(value: ir.Value) -> ir.DataType | None:
    """Returns the element type of the router's numbers; where the model says none, that of what they are made of."""

    def before(at: ir.Value) -> list[ir.Value]:
        producer = at.producer()
        return [] if at.dtype is not None or (producer and producer.op_type == "Cast") else producers(at)[:1]

    *_, first = walk([value], before, limit=None)
    producer = first.producer()
    return cast_type(producer) if first.dtype is None and producer and producer.op_type == "Cast" else first.dtype
