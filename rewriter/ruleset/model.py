"""What a rule set is once read: frozen dataclasses that the engine runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from onnxscript.rewriter.pattern import RewriteRule, RewriteRuleClassBase

from rewriter.graph._onnxscript import OpKey, compiled, root_operator
from rewriter.quantize.plan import AccuracyLevel, QuantizationPlan

Rule = RewriteRuleClassBase | RewriteRule
_MOVING = "unstack"
"""The rule that begins at what moves a weight, and quantizes nothing."""
LocalParity = Literal["class", "all", "none"]


@dataclass(frozen=True)
class BoundRule:
    """A rule with its options.

    Attributes:
        name: its id, as in YAML and reports.
        options: every option with its value, the defaults included.
        rules: the onnxscript rules that it consists of; left out of comparisons, since equal options make equal rules
            but never the same objects.
    """

    name: str
    options: Mapping[str, object]
    rules: tuple[Rule, ...] = field(compare=False)


@dataclass(frozen=True)
class Phase:
    """Rules that run together, sweep after sweep, until a sweep fires nothing.

    Attributes:
        name: unique in its rule set.
        rules: in the order in which they are tried at a node.
        max_sweeps: a phase that still fires after so many sweeps is an error.
    """

    name: str
    rules: tuple[BoundRule, ...]
    max_sweeps: int = 20


@dataclass(frozen=True)
class ParitySettings:
    """How rewrites are proved, and the limits for the whole model; a limit that is None is not held.

    Attributes:
        local: which applications are proved by running them: one to four of each
            structural class, all, or none.
        seed: of the random inputs.
        max_bytes: of one rewrite's weights in float32 above which it is not run whole: of a stack of experts some are
            run; what has no stack is not run.
        max_relative_l2: largest relative L2 error of an output.
        min_snr_db: smallest signal-to-noise ratio of an output, in dB.
        min_top1: smallest share of positions, 0 to 1, whose highest logit stays the same.
        timeout: seconds that one run of a proof, or of a whole model that ``apply`` compares, may take.
    """

    local: LocalParity = "class"
    seed: int = 0
    max_relative_l2: float | None = None
    min_snr_db: float | None = None
    min_top1: float | None = None
    timeout: float = 300.0
    max_bytes: int = 1 << 28


@dataclass(frozen=True)
class RuleSet:
    """What the engine runs.

    Attributes:
        name: a shipped set's id, a file's stem, or ``inline``.
        description: one sentence.
        phases: run one after the other.
        plan: which weight is quantized, and how.
        parity: how the result is proved.
        target: runtime to rewrite for.
        rounded_activations: whether fused experts may be written where the target's kernel rounds activations to 8
            bits; such a rewrite is proved by the reference, on the bytes that are written.
        accuracy_level: of every MatMulNBits and QMoE whose rule does not say another: 0 leaves it to the runtime; 4
            lets the CPU provider round activations to 8 bits, of fused experts too.
    """

    name: str
    description: str = ""
    phases: tuple[Phase, ...] = ()
    plan: QuantizationPlan = field(default_factory=QuantizationPlan)
    parity: ParitySettings = field(default_factory=ParitySettings)
    target: str = "auto"
    rounded_activations: bool = False
    accuracy_level: AccuracyLevel = 0

    @property
    def quantizes(self) -> bool:
        """Whether anything is planned for weights."""
        return self.plan != QuantizationPlan()

    def reads(self, operator: OpKey) -> bool:
        """Whether a rule that may quantize begins at an operator."""
        return not self._roots.isdisjoint({None, operator})

    @cached_property
    def _roots(self) -> frozenset[OpKey | None]:
        bound = (bound for phase in self.phases for bound in phase.rules if bound.name != _MOVING)
        return frozenset(root_operator(compiled(rule)) for found in bound for rule in found.rules)
