"""The records of the rule set that a run used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class UsedRule:
    """A rule of a phase.

    Attributes:
        name: its id.
        options: every option with its value, the defaults included.
    """

    name: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class UsedPhase:
    """Rules that ran together.

    Attributes:
        name: unique in the rule set.
        rules: in the order in which they are tried at a node.
    """

    name: str
    rules: tuple[UsedRule, ...]


@dataclass(frozen=True)
class PlanLine:
    """One line of a quantization plan.

    Attributes:
        kind: ``default``, ``include``, ``exclude`` or ``override``.
        selects: which weights it is about; empty for the default, which is about all.
        values: what it says of them.
        weights: how many weights of the model it picks, of those that a rule would quantize; the default's are those
            that do not stay float. None where nothing was run.
        overruled: for how many of them other lines decide all that it says; None as above.
    """

    kind: str
    selects: str
    values: Mapping[str, Any]
    weights: int | None = None
    overruled: int | None = None

    @property
    def dead(self) -> bool:
        """Whether it decides nothing at all."""
        return self.weights == 0 or bool(self.weights and self.overruled == self.weights)

    @property
    def idle(self) -> str:
        """Says that it picks nothing, or decides nothing of what it picks; empty where it is of use."""
        if self.weights == 0:
            return "picks no weight"
        if not self.overruled:
            return ""
        whole = self.overruled == self.weights
        return f"overruled by other lines for {'all of them' if whole else f'{self.overruled:,} of them'}"


@dataclass(frozen=True)
class UsedRuleSet:
    """The rule set of a run, with everything that was changed in it for the run.

    Attributes:
        name: a shipped set's id, a file's stem, or ``inline``.
        description: one sentence.
        phases: in the order in which they ran.
        plan: which weight is quantized, and how; of the overrides the last wins.
        parity: how rewrites are proved, and the limits for the whole model.
        activations: what was accepted of kernels that round activations: ``rounded_activations``, ``accuracy_level``.
    """

    name: str
    description: str = ""
    phases: tuple[UsedPhase, ...] = ()
    plan: tuple[PlanLine, ...] = ()
    parity: Mapping[str, Any] = field(default_factory=dict)
    activations: Mapping[str, Any] = field(default_factory=dict)
