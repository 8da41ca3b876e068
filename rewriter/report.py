"""What a run did, as data: applications, declines, weights, proofs and sizes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Application:
    """One rewrite that happened.

    Attributes:
        rule: the rule's name.
        phase: the phase in which it fired.
        sweep: the sweep of that phase, from 1.
        node: name of the node at which the pattern matched.
        replaced: operator types that went.
        by: operator types that came.
        proof: index into ``Report.proofs``, or None where nothing had to be run.
    """

    rule: str
    phase: str
    sweep: int
    node: str
    replaced: tuple[str, ...]
    by: tuple[str, ...]
    proof: int | None


@dataclass(frozen=True)
class Decline:
    """One place where a rule was about to fire and did not.

    Attributes:
        rule: the rule's name.
        phase: the phase in which it was tried.
        node: name of the node at which the pattern matched.
        reason: why not.
        culprit: name of the node or value at fault; empty where it is the node itself.
    """

    rule: str
    phase: str
    node: str
    reason: str
    culprit: str


@dataclass(frozen=True)
class Proof:
    """How the rewrites of one structural class were shown to be right.

    Attributes:
        rule: the rule's name.
        runtime: what ran both sides.
        max_relative: largest error over the largest magnitude of the expected output.
        tolerance: what it was held against.
        node: the application that was run.
        skipped: why nothing was run; empty where it was.
    """

    rule: str
    runtime: str
    max_relative: float
    tolerance: float
    node: str
    skipped: str = ""


@dataclass(frozen=True)
class Weight:
    """One quantized weight, known when it has been written.

    Attributes:
        name: the weight's canonical name.
        node: the node that reads it.
        role: what it is for; empty where the structure does not tell.
        layer: index of its layer, or None.
        expert: index of its expert, or None.
        algorithm: how it was quantized.
        bits: width of a code.
        block_size: input features per scale; 0 for a whole row.
        symmetric: whether it has no zero points.
        bytes_before: as a float weight.
        bytes_after: codes, scales and zero points.
        relative_rms: root mean square error over that of the weight.
    """

    name: str
    node: str
    role: str
    layer: int | None
    expert: int | None
    algorithm: str
    bits: int
    block_size: int
    symmetric: bool
    bytes_before: int
    bytes_after: int
    relative_rms: float


@dataclass(frozen=True)
class Report:
    """Everything that a run has to say; complete once the model is saved."""

    rule_set: str
    target: str
    applications: tuple[Application, ...] = ()
    declines: tuple[Decline, ...] = ()
    proofs: tuple[Proof, ...] = ()
    weights: tuple[Weight, ...] = ()
    sweeps: Mapping[str, int] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0
    parity: Mapping[str, Any] | None = None

    @property
    def applied(self) -> dict[str, int]:
        """Rule -> number of applications."""
        return dict(Counter(a.rule for a in self.applications))

    @property
    def declined(self) -> dict[tuple[str, str], int]:
        """(Rule, reason) -> number of declines, most frequent first."""
        return dict(Counter((d.rule, d.reason) for d in self.declines).most_common())

    def to_json(self) -> dict[str, Any]:
        """Returns the report as plain JSON data, with the version of its schema."""
        data = dataclasses.asdict(self)
        return {"schema_version": SCHEMA_VERSION, "applied": self.applied, **data}
