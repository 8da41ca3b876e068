"""What the values of an expert hold: tokens, linears, activated features, the output; and whose weights they are.

N output features, K input features, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import onnx_ir as ir

from rewriter.operators.activation import Activation, Step
from rewriter.rules.blocks.axes import Atom, Content
from rewriter.tensors import View


@dataclass(frozen=True)
class Tokens(Content):
    """The input of the experts: one row of features for every token.

    Attributes:
        x: [.., H] the value, whose own axes are those of its tokens and one of features.
    """

    x: ir.Value


@dataclass(frozen=True)
class Dense:
    """A float weight.

    Attributes:
        view: [N, K], or [E, N, K] of all experts.
    """

    view: View

    @property
    def sizes(self) -> tuple[int, int]:
        """(N, K)."""
        return self.view.shape[-2], self.view.shape[-1]

    @property
    def dtype(self) -> ir.DataType:
        """Element type, which x has too."""
        return self.view.dtype

    @property
    def stack_size(self) -> int:
        """E, of a weight of all experts."""
        return self.view.shape[0] if self.view.rank == 3 else 1

    def rows(self, start: int, count: int, step: int) -> Dense:
        """Returns evenly stepping output features."""
        return Dense(self.view.slice(self.view.rank - 2, start, count, step))

    def expert(self, position: int) -> Dense:
        """Returns one expert of a weight of all."""
        return Dense(self.view.index(0, position))


@dataclass(frozen=True)
class Packed:
    """A MatMulNBits weight of one expert.

    Attributes:
        codes: [N, blocks, blob] uint8.
        scales: [N, blocks].
        zero_points: [N, ceil(blocks * bits / 8)] uint8, or None.
        k: input features.
        bits: width of a code.
        block: input features per scale.
    """

    codes: View
    scales: View
    zero_points: View | None
    k: int
    bits: int
    block: int

    @property
    def sizes(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0], self.k

    @property
    def dtype(self) -> ir.DataType:
        """Element type of the scales, which x has too."""
        return self.scales.dtype

    @property
    def stack_size(self) -> int:
        """A packed weight is always one expert's."""
        return 1

    def rows(self, start: int, count: int, step: int) -> Packed:
        """Returns evenly stepping output features."""
        zeros = self.zero_points
        return dataclasses.replace(
            self,
            codes=self.codes.slice(0, start, count, step),
            scales=self.scales.slice(0, start, count, step),
            zero_points=None if zeros is None else zeros.slice(0, start, count, step),
        )

    def expert(self, position: int) -> Packed:
        """A packed weight is always one expert's."""
        raise AssertionError(position)


Weight = Dense | Packed


@dataclass(frozen=True)
class Scores:
    """What experts are selected by, or mixed with: a function of one number per expert.

    Attributes:
        logits: [.., E] the value.
        function: ``logits``: as it is; ``softmax``, or its logarithm; ``sigmoid``; ``positive``: as it is,
            and never negative.
    """

    logits: ir.Value
    function: Literal["logits", "softmax", "log_softmax", "sigmoid", "positive"]

    @property
    def positive(self) -> bool:
        """Whether no score is negative, whatever the logits are."""
        return self.function not in ("logits", "log_softmax")

    @property
    def shifted(self) -> bool:
        """Whether a softmax of these scores is that of some logits: a number for each token makes no difference."""
        return self.function in ("logits", "positive", "log_softmax")


@dataclass(frozen=True)
class Composed:
    """What a value is a function of, as people write it, where no other fact names that.

    Attributes:
        text: as ``tanh(x)``.
    """

    text: str


@dataclass(frozen=True)
class Router:
    """The selection of k of E experts for every token.

    Attributes:
        node: the TopK, or the ArgMax.
        scores: what it selects by.
        k: experts per token.
        experts: E.
        fault: why no operator selects so; empty where one does.
        made: what else the choice was made of: choices of one expert each side by side, or the one that was changed.
        choice: [.., k] the choice, where ``node`` is not what makes it. Not compared.
    """

    node: ir.Node
    scores: Scores
    k: int
    experts: int
    fault: str = ""
    made: tuple[Router, ...] = ()
    choice: ir.Value | None = field(default=None, compare=False)

    @property
    def selects(self) -> bool:
        """Whether it chooses by its scores, and by no table."""
        return self.node.op_type not in ("Gather", "GatherND")

    @property
    def indices(self) -> ir.Value:
        """[.., k] which experts, or [..] of an ArgMax that keeps no dimension."""
        return self.choice or self.node.outputs[-1]


@dataclass(frozen=True)
class Slot:
    """The expert that a router chose in one of a token's slots.

    Attributes:
        router: what chose.
        number: which slot.
    """

    router: Router
    number: int


By = Router | Slot | Literal["one", "all"]
"""Which expert a weight is of: the one there is, each along the expert axis, or the one that the router chose."""


@dataclass(frozen=True)
class Linear:
    """A linear map of tokens.

    Attributes:
        x: the tokens.
        weight: [N, K], or of all experts.
        bias: [N], or [E, N] of all experts; None for none.
        by: whose weight it is.
        share: what each token is multiplied with before, expert by expert; None for nothing.
    """

    x: ir.Value
    weight: Weight
    bias: View | None
    by: By
    share: Content | None = None

    def rows(self, start: int, count: int, step: int) -> Linear:
        """Returns evenly stepping output features."""
        bias = self.bias
        if bias is not None:
            bias = bias.slice(bias.rank - 1, start, count, step)
        return Linear(self.x, self.weight.rows(start, count, step), bias, self.by, self.share)

    def expert(self, position: int) -> Linear:
        """Returns one expert of a linear of all."""
        bias = None if self.bias is None else self.bias.index(0, position)
        return dataclasses.replace(self, weight=self.weight.expert(position), bias=bias, by="one")


@dataclass(frozen=True)
class Factor:
    """Elementwise functions of a linear, the first applied first."""

    linear: Linear
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Features(Content):
    """A product of elementwise functions of linears of the same tokens; features lie along the feature index.

    Attributes:
        factors: what is multiplied.
        scale: a number that multiplies several; of one it is a step.
    """

    factors: tuple[Factor, ...]
    scale: float = 1.0

    def fix(self, atom: Atom, position: int) -> Content | None:
        if atom.kind != "expert" or any(f.linear.by != "all" for f in self.factors):
            return super().fix(atom, position)
        return self.each(lambda linear: linear.expert(position))

    def part(self, atom: Atom, start: int, count: int, step: int) -> Content | None:
        if atom.kind != "feature":
            return super().part(atom, start, count, step)
        return self.each(lambda linear: linear.rows(start, count, step))

    def each(self, part: Callable[[Linear], Linear]) -> Features:
        """Returns the same functions of other linears."""
        return Features(tuple([Factor(part(factor.linear), factor.steps) for factor in self.factors]), self.scale)


@dataclass(frozen=True)
class Activated:
    """The function between an expert's projections, as com.microsoft::MoE has it.

    Attributes:
        kind: which.
        alpha: of swiglu: g * sigmoid(alpha * g) * (l + beta).
        beta: see alpha.
        limit: g is at most this and l at most this in magnitude; None for no limit.
    """

    kind: Activation
    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None


@dataclass(frozen=True)
class Output(Content):
    """What an expert returns.

    Attributes:
        activation: the function between the projections.
        gate: [I, H] the projection that is activated.
        up: [I, H] the projection that multiplies it; None for an expert without.
        down: [H, I].
        bias: of down.
        inner: what down reads; not compared.
    """

    activation: Activated
    gate: Linear
    up: Linear | None
    down: Weight
    bias: View | None = None
    inner: ir.Value | None = dataclasses.field(default=None, compare=False)

    @property
    def by(self) -> By:
        """Whose weights these are."""
        return self.gate.by

    def of(self, by: By) -> Output:
        """Returns the same with another say of whose weights these are."""
        up = None if self.up is None else dataclasses.replace(self.up, by=by)
        return dataclasses.replace(self, gate=dataclasses.replace(self.gate, by=by), up=up)

    def plain(self) -> Output:
        """Returns what the same experts return of the tokens as they are."""
        up = None if self.up is None else dataclasses.replace(self.up, share=None)
        return dataclasses.replace(self, gate=dataclasses.replace(self.gate, share=None), up=up)

    def on(self, x: ir.Value) -> Output:
        """Returns what the same experts return of other tokens."""
        up = None if self.up is None else dataclasses.replace(self.up, x=x)
        return dataclasses.replace(self, gate=dataclasses.replace(self.gate, x=x), up=up)

    def expert(self, position: int) -> Output:
        """Returns one expert of the output of all."""
        return dataclasses.replace(
            self,
            gate=self.gate.expert(position),
            up=None if self.up is None else self.up.expert(position),
            down=self.down.expert(position),
            bias=None if self.bias is None else self.bias.index(0, position),
        )

    def fix(self, atom: Atom, position: int) -> Content | None:
        return self.expert(position) if atom.kind == "expert" and self.by == "all" else super().fix(atom, position)
