"""What the values of a router and of a combine hold: choices, weights, masks, shares, and sums of experts.

T tokens, k slots per token, E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from rewriter.graph.attributes import integer_attribute
from rewriter.rules.blocks.axes import Atom, Content, Located
from rewriter.rules.blocks.contents import Features, Output, Router, Scores, Slot
from rewriter.tensors import View


@dataclass(frozen=True)
class Chosen(Content):
    """The experts that a router chose; ``slot`` where it is one slot's."""

    router: Router
    slot: int | None = None

    def fix(self, atom: Atom, position: int) -> Content | None:
        return Chosen(self.router, position) if atom.kind == "slot" else super().fix(atom, position)

    def part(self, atom: Atom, start: int, count: int, step: int) -> Content | None:
        router = first_slots(self.router, count) if atom.kind == "slot" and (start, step) == (0, 1) else None
        return None if router is None else Chosen(router)


@dataclass(frozen=True)
class Mixing(Content):
    """The weights with which a router mixes what it chose.

    Attributes:
        router: what chose.
        scores: where the weights come from.
        dense: [.., E] the scores themselves.
        stage: ``raw``: the chosen experts' scores; ``normalised``: divided by their sum; ``softmax``: over them;
            ``unit``: one, whatever the scores are.
        scale: a factor of all weights.
        table: [E] a factor for every expert, or None.
        rounded: the narrowest type to which they were cast, or None.
        slot: where they are one slot's.
        late: whether the scores are a function of the chosen logits alone, so that ``dense`` is not them.
        opaque: [.., k] the weights, where they are no function of the scores that is known.
        fault: why they are not the router's weights as an operator has them; empty where they are. Not compared.
        value: [.., k] the weights, where one value holds all of them. Not compared.
        before: whether the tokens are multiplied with them, and not what the experts return.
        times: [.., 1] what each expert's share of the sum is multiplied with besides, or None.
    """

    router: Router
    scores: Scores
    dense: ir.Value
    stage: Literal["raw", "normalised", "softmax", "unit"] = "raw"
    scale: float = 1.0
    table: View | None = None
    rounded: ir.DataType | None = None
    slot: int | None = None
    late: bool = False
    opaque: ir.Value | None = None
    fault: str = dataclasses.field(default="", compare=False)
    value: ir.Value | None = dataclasses.field(default=None, compare=False)
    before: bool = False
    times: ir.Value | None = None

    @property
    def positive(self) -> bool:
        """Whether no weight is negative, whatever the logits are."""
        table = None if self.table is None else np.asarray(self.table.numpy())
        kept = self.scale > 0 and (table is None or bool((table > 0).all()))
        return kept and (self.stage in ("softmax", "unit") or self.scores.positive)

    def fix(self, atom: Atom, position: int) -> Content | None:
        return dataclasses.replace(self, slot=position) if atom.kind == "slot" else super().fix(atom, position)

    def part(self, atom: Atom, start: int, count: int, step: int) -> Content | None:
        first = atom.kind == "slot" and (start, step) == (0, 1) and self.stage == "raw"
        router = first_slots(self.router, count) if first else None
        return None if router is None else dataclasses.replace(self, router=router, value=None)


def unit(router: Router) -> Mixing:
    """Returns the weights of a router that chooses one expert and does not weigh it: one."""
    return Mixing(router, router.scores, router.scores.logits, "unit", value=router.indices)


def first_slots(router: Router, count: int) -> Router | None:
    """Returns the router that chooses fewer: the first of a TopK's slots, which are in descending order."""
    ordered = router.node.op_type == "TopK" and integer_attribute(router.node, "sorted", 1) and not router.made
    return dataclasses.replace(router, k=count) if ordered and count else None


@dataclass(frozen=True)
class Every(Content):
    """The scores of all experts, along an expert index.

    Attributes:
        scores: them.
        value: [.., E] them.
    """

    scores: Scores
    value: ir.Value


@dataclass(frozen=True)
class Total(Content):
    """The sum of a token's weights, over its slots."""

    mixing: Mixing


@dataclass(frozen=True)
class Part(Content):
    """The sum of a token's weights in some of its slots.

    Attributes:
        mixing: the weights, of no slot in particular.
        slots: which.
    """

    mixing: Mixing
    slots: frozenset[int]


@dataclass(frozen=True)
class Mask(Content):
    """Whether a slot holds an expert.

    Attributes:
        router: what chose.
        expert: which; None where there is an expert index.
        slot: which slot; None where there is a slot index.
        whole: whether it tells of all slots at once, and there is no slot index left.
    """

    router: Router
    expert: int | None
    slot: int | None = None
    whole: bool = False

    def fix(self, atom: Atom, position: int) -> Content | None:
        if atom.kind == "slot":
            return dataclasses.replace(self, slot=position)
        return dataclasses.replace(self, expert=position) if atom.kind == "expert" else super().fix(atom, position)


@dataclass(frozen=True)
class Without(Content):
    """Where a mask does not hold."""

    mask: Mask

    def fix(self, atom: Atom, position: int) -> Content | None:
        mask = self.mask.fix(atom, position)
        return Without(mask) if isinstance(mask, Mask) else None


@dataclass(frozen=True)
class Share(Content):
    """The weight with which an expert is mixed in, 0 where it was not chosen.

    Attributes:
        mixing: the weights, of no slot in particular.
        expert: whose share; None where there is an expert index.
        slots: the slots that are counted; None where there still is a slot index.
    """

    mixing: Mixing
    expert: int | None
    slots: frozenset[int] | None

    @property
    def complete(self) -> bool:
        """Whether every slot is counted."""
        return self.slots == frozenset(range(self.mixing.router.k))

    def fix(self, atom: Atom, position: int) -> Content | None:
        if atom.kind == "expert":
            return dataclasses.replace(self, expert=position)
        return (
            dataclasses.replace(self, slots=frozenset({position}))
            if atom.kind == "slot"
            else super().fix(atom, position)
        )


@dataclass(frozen=True)
class Admitted(Content):
    """Tokens times the weight of each expert, or the mask of one: nothing where it was not chosen.

    Attributes:
        x: [.., H] the tokens.
        share: the weights, or the mask.
    """

    x: ir.Value
    share: Share | Mask


@dataclass(frozen=True)
class Carried(Content):
    """What lies between an expert's projections, times its weight: down is linear, so that its output is weighed.

    Attributes:
        features: what down would read.
        share: the weight, where it lies.
    """

    features: Features
    share: Located


@dataclass(frozen=True)
class Sparse(Content):
    """The chosen logits where their experts are, and minus infinity elsewhere."""

    mixing: Mixing


@dataclass(frozen=True)
class Stack(Content):
    """What a router's choice gathers from a constant [E, ..]; the other dimensions are ``weight`` indices.

    Attributes:
        view: the constant.
        by: the choice.
    """

    view: View
    by: Router | Slot

    def part(self, atom: Atom, start: int, count: int, step: int) -> Content | None:
        if atom.kind != "weight":
            return super().part(atom, start, count, step)
        return Stack(self.view.slice(atom.index, start, count, step), self.by)


# Sums. Compared by identity: they are as long as a block.


@dataclass(frozen=True, eq=False)
class Term:
    """One expert's output times its share.

    Attributes:
        expert: which; None for the one that was chosen in a slot.
        slots: the slots in which it counts.
        output: what is mixed; None where it is not known to be an expert's output.
        value: what is mixed.
        node: the product.
    """

    expert: int | None
    slots: frozenset[int]
    output: Output | None
    value: ir.Value
    node: ir.Node


@dataclass(frozen=True, eq=False)
class Start:
    """What a sum of experts starts from: a residual, a shared expert, anything that is no part of the block.

    Attributes:
        value: it.
        node: where it is added.
    """

    value: ir.Value
    node: ir.Node


@dataclass(frozen=True, eq=False)
class Mixed(Content):
    """A sum of experts' outputs under one router; a rope, so that adding one more costs the same for each.

    Attributes:
        mixing: the router's weights.
        parts: what is added: terms, sums, and what these start from.
        counted: how many pairs of an expert and a slot are in.
        begun: whether it starts from something.
    """

    mixing: Mixing
    parts: tuple[Term | Mixed | Start, ...]
    counted: int = dataclasses.field(init=False)
    begun: bool = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        experts = self.mixing.router.experts
        counts = (_counted(part, experts) for part in self.parts)
        object.__setattr__(self, "counted", sum(counts))
        begun = (part.begun if isinstance(part, Mixed) else isinstance(part, Start) for part in self.parts)
        object.__setattr__(self, "begun", any(begun))

    def terms(self) -> Iterator[Term]:
        """Yields the terms from left to right."""
        return (part for part in self._leaves() if isinstance(part, Term))

    def starts(self) -> Iterator[Start]:
        """Yields what the sum starts from."""
        return (part for part in self._leaves() if isinstance(part, Start))

    @property
    def complete(self) -> bool:
        """Whether as many terms are there as the router has experts and slots."""
        router = self.mixing.router
        return self.counted >= router.experts * router.k

    def _leaves(self) -> Iterator[Term | Start]:
        stack: list[Term | Mixed | Start] = [self]
        while stack:
            part = stack.pop()
            if isinstance(part, Mixed):
                stack.extend(reversed(part.parts))
            else:
                yield part


def _counted(part: Term | Mixed | Start, experts: int) -> int:
    if isinstance(part, Mixed):
        return part.counted
    return len(part.slots) * (1 if part.expert is not None else experts) if isinstance(part, Term) else 0


@dataclass(frozen=True, eq=False)
class Unmasked(Content):
    """One expert's output times the weight of a slot, whether the slot holds that expert or not.

    Attributes:
        mixing: the slot's weight.
        output: what is weighed.
        value: its value.
        node: the product.
    """

    mixing: Mixing
    output: Output
    value: ir.Value
    node: ir.Node


@dataclass(frozen=True, eq=False)
class Weighted(Content):
    """Outputs of chosen or of all experts times their weights, not yet summed.

    Attributes:
        mixing: the router's weights.
        output: what is mixed; None where it is not known to be the experts' output.
        value: what is mixed.
        over: the index that is to be summed.
        node: the product.
    """

    mixing: Mixing
    output: Output | None
    value: ir.Value
    over: Literal["slot", "expert"]
    node: ir.Node


@dataclass(frozen=True, eq=False)
class Complete(Content):
    """The sum of a ``Weighted`` over its index: every expert, mixed."""

    weighted: Weighted


@dataclass(frozen=True, eq=False)
class Filled(Content):
    """Outputs of some of a router's experts, each where that expert was chosen; a list from the last to the first.

    Attributes:
        router: what chose.
        expert: whose output was put in last.
        output: it.
        before: what was there before; None for one number everywhere.
        count: how many experts are in.
    """

    router: Router
    expert: int
    output: Output
    before: Filled | None
    count: int

    def outputs(self) -> dict[int, Output]:
        """Returns the outputs by expert."""
        found: dict[int, Output] = {}
        at: Filled | None = self
        while at is not None:
            found[at.expert], at = at.output, at.before
        return found

    def summed(self, node: ir.Node) -> Mixed | None:
        """Returns them as a sum, as each token has one expert and nothing weighs it; None where it has several."""
        if self.router.k != 1:
            return None
        rows, slot = node.outputs[0], frozenset({0})
        return Mixed(unit(self.router), tuple(Term(e, slot, own, rows, node) for e, own in self.outputs().items()))
