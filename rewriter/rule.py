"""What a rule is written with: the base class, the two ways to say no, and what a run offers to a rule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import onnx_ir as ir
from onnxscript.rewriter import RewriteRuleClassBase

from rewriter.facts import Facts, Transfer
from rewriter.graph.declines import Declined, NotApplicable
from rewriter.quantize.born import Look
from rewriter.quantize.job import QuantizationJob
from rewriter.quantize.plan import AccuracyLevel
from rewriter.roles import Role
from rewriter.target import Target
from rewriter.tensors import View

__all__ = ["Declined", "Fed", "NotApplicable", "Replacement", "Rule", "Run"]


@dataclass(frozen=True)
class Fed:
    """What a rule knows of a value that its replacement reads, so that the proof can feed it.

    Attributes:
        dtype: element type.
        shape: each dimension as a number times named unknowns; one name has one size.
        chosen: how many of the largest in each row are chosen; the numbers are then well separated, so that no rounding
            changes which these are, and rows enough that each position is among them once. 0 for other numbers.
        positive: whether all numbers are.
        below: what integers are drawn from 0 up to; 0 for numbers.
        total: unknowns whose sum, with ``plus``, every element is; empty for random numbers.
        plus: see total.
    """

    dtype: ir.DataType
    shape: tuple[tuple[int, tuple[str, ...]], ...]
    chosen: int = 0
    positive: bool = False
    below: int = 0
    total: tuple[str, ...] = ()
    plus: int = 0


@dataclass(frozen=True)
class Replacement:
    """What a rule returns that matches one node of a larger block.

    Attributes:
        outputs: old value -> new value.
        covers: the nodes of the block; they go as far as nothing else reads them, and the proof runs them.
        fed: what is known of the values that the block reads.
        roles: what the weights of the nodes that make these new values are for, where it is not the root's role.
        layouts: matched node -> the layout of its weights, where the rule knows it and the node's metadata does not
            tell; the proof then reads them so.
    """

    outputs: Mapping[ir.Value, ir.Value]
    covers: Sequence[ir.Node]
    fed: Mapping[ir.Value, Fed] = field(default_factory=dict)
    roles: Mapping[ir.Value, str] = field(default_factory=dict)
    layouts: Mapping[ir.Node, str] = field(default_factory=dict)


class Run(Protocol):
    """What the engine offers to the rules of a run.

    Attributes:
        target: the runtime that the result is for.
        rounded_activations: whether experts may be fused where the target's kernel rounds activations to 8 bits.
        accuracy_level: what MatMulNBits and QMoE are written with where a rule's own option does not say; 0 leaves it
            out.
        looks_whole: whether all of a weight is read to tell on which grid it lies; else a sample, and the rest when
            written.
        looks: what was seen of weights so far, of which it asks.
    """

    target: Target
    rounded_activations: bool
    accuracy_level: AccuracyLevel
    looks_whole: bool
    looks: MutableMapping[View, Look]

    @property
    def facts(self) -> Facts:
        """What the recognisers have stated so far."""

    def role(self, node: ir.Node) -> Role:
        """Returns what the weight that ``node`` reads is for."""

    def quantize(
        self,
        weight: View,
        reader: ir.Node,
        *given: Any,
        role: str = "",
        expert: int | None = None,
    ) -> QuantizationJob:
        """Returns the job that will quantize ``weight`` [N, K] as the plan says.

        Args:
            weight: the matrix, or one expert's slice of a stack.
            reader: the node that reads it.
            given: the rule's name and the dtype of the scales, as rules of 0.1 give them. The run knows which rule it
                tries, and scales are stored in the weight's own type.
            role: what the weight is for, where the reader has several; by default the reader's role.
            expert: index of the expert, where the reader holds all of them.

        Raises:
            Declined: the plan keeps the weight in float.
        """


class Rule(RewriteRuleClassBase):
    """An onnxscript rule that may use facts and quantize weights; the engine binds ``run`` for each run.

    Attributes:
        recognisers: what must have been stated, beside what is constant, before this rule is tried.
        explains: whether it never fires, and only says why others did not: asked where nothing fires any more.
        run: facts, target and quantizer of the present run.
    """

    recognisers: ClassVar[Iterable[Transfer]] = ()
    explains: ClassVar[bool] = False
    run: Run

    def may_begin(self, node: ir.Node) -> bool:
        """Whether the rule may be about a node of the operator at its pattern's root, as far as a look at facts tells.

        Asked before the pattern is matched, at every such node of a model: large models have 10,000s at which a rule
        has nothing to do. False where it would say ``NotApplicable``, never where it would decline with a reason.
        """
        del node
        return True

    def rewrite(self, op: Any, *args: Any, **bindings: Any) -> Any:
        """Declines by raising, before it builds anything; else builds the replacement with ``op``.

        Returns:
            The new outputs in the pattern's order, a mapping old value -> new value, or a ``Replacement``.
        """
        raise NotImplementedError
