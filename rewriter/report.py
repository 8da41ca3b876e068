"""What a run did, as data: applications, declines, weights, proofs and sizes."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping
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
        because: why the reference operators judged and ONNX Runtime did not; empty where it did.
        experts: how many experts of a stack were run, where it is too large to run all; else None.
    """

    rule: str
    runtime: str
    max_relative: float
    tolerance: float
    node: str
    skipped: str = ""
    because: str = ""
    experts: int | None = None


@dataclass(frozen=True)
class Weight:
    """One quantized weight, known when it has been written.

    Attributes:
        name: the weight's canonical name.
        node: the node that reads it.
        role: what it is for; empty where the structure does not tell.
        layer: index of its layer, or None.
        expert: index of its expert, or None.
        shape: (N, K), output and input features.
        algorithm: how it was quantized.
        bits: width of a code.
        block_size: input features per scale; 0 for a whole row.
        symmetric: whether it has no zero points.
        bytes_before: as a float weight.
        bytes_after: codes, scales and zero points.
        relative_rms: root mean square error over that of the weight.
        planned_block_size: what the plan asked for, where the operator has no such block for this weight; else None.
    """

    name: str
    node: str
    role: str
    layer: int | None
    expert: int | None
    shape: tuple[int, int]
    algorithm: str
    bits: int
    block_size: int
    symmetric: bool
    bytes_before: int
    bytes_after: int
    relative_rms: float
    planned_block_size: int | None = None


@dataclass(frozen=True)
class RoleSummary:
    """The quantized weights of one role.

    Attributes:
        role: what they are for; empty where the structure does not tell.
        count: how many there are.
        bits: the widths of their codes, ascending.
        elements: how many numbers they hold.
        bytes_before: as float weights.
        bytes_after: codes, scales and zero points.
        mean_relative_rms: mean over the weights.
        worst: the weight with the largest error.
    """

    role: str
    count: int
    bits: tuple[int, ...]
    elements: int
    bytes_before: int
    bytes_after: int
    mean_relative_rms: float
    worst: Weight

    @property
    def bits_per_element(self) -> float:
        """Bits stored for each number, scales and zero points included."""
        return self.bytes_after * 8 / self.elements if self.elements else 0.0


@dataclass(frozen=True)
class Report:
    """Everything that a run has to say; complete once the model is saved.

    Attributes:
        rule_set: name of what was run.
        target: the runtime it was run for.
        applications: every rewrite, in order.
        declines: every place where a rule was about to fire and did not.
        proofs: one per structural class that was run.
        weights: every quantized weight that has been written, the largest error first.
        sweeps: phase -> sweeps until nothing fired.
        bytes_before: of all tensors of the model that was given.
        bytes_after: of all tensors of the rewritten model.
        parity: how its outputs compare with the original's, or why they were not compared; None where nobody asked.
    """

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

    @property
    def by_role(self) -> tuple[RoleSummary, ...]:
        """The quantized weights summed up by role, the most bytes first."""
        return summarize(self.weights)

    def to_json(self) -> dict[str, Any]:
        """Returns the report as plain JSON data, with the version of its schema.

        JSON has no infinity and no NaN: they are the strings ``inf``, ``-inf`` and ``nan``.
        """
        plain: dict[str, Any] = _plain(dataclasses.asdict(self))
        return {"schema_version": SCHEMA_VERSION, "applied": self.applied, **plain}


def summarize(weights: Iterable[Weight]) -> tuple[RoleSummary, ...]:
    """Sums weights up by role, the most bytes first."""
    groups: dict[str, list[Weight]] = {}
    for weight in weights:
        groups.setdefault(weight.role, []).append(weight)
    summaries = [
        RoleSummary(
            role=role,
            count=len(group),
            bits=tuple(sorted({w.bits for w in group})),
            elements=sum(math.prod(w.shape) for w in group),
            bytes_before=sum(w.bytes_before for w in group),
            bytes_after=sum(w.bytes_after for w in group),
            mean_relative_rms=sum(w.relative_rms for w in group) / len(group),
            worst=max(group, key=lambda w: w.relative_rms),
        )
        for role, group in groups.items()
    ]
    return tuple(sorted(summaries, key=lambda s: (-s.bytes_before, s.role)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
