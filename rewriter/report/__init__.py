"""What a run did, as data: applications, declines, weights, proofs and sizes."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rewriter.report.provenance import Made, Provenance
from rewriter.report.quality import Estimate, Quality
from rewriter.report.records import (
    Application,
    Comparison,
    Decline,
    Left,
    Metrics,
    Misfit,
    Proof,
    RoleSummary,
    Size,
    Weight,
)
from rewriter.report.refusals import Refusal, refusals
from rewriter.report.sized import Sized, SizeGiven
from rewriter.report.summaries import KEPT, Change, LayerError, by_layer, changes, on_grids, summarize
from rewriter.report.used import PlanLine, UsedPhase, UsedRule, UsedRuleSet
from rewriter.text import shrink

__all__ = [
    "KEPT",
    "SCHEMA_VERSION",
    "Application",
    "Change",
    "Comparison",
    "Decline",
    "Estimate",
    "LayerError",
    "Left",
    "Made",
    "Metrics",
    "Misfit",
    "PlanLine",
    "Proof",
    "Provenance",
    "Quality",
    "Refusal",
    "Report",
    "RoleSummary",
    "Size",
    "SizeGiven",
    "Sized",
    "UsedPhase",
    "UsedRule",
    "UsedRuleSet",
    "Weight",
    "document",
    "summarize",
]

SCHEMA_VERSION = 2
"""Of every JSON document that the command line prints or writes."""


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
        left: the weights that stay float, the largest first, with what declined there.
        sweeps: phase -> sweeps until nothing fired.
        files_before: bytes of the files of the model that was given; 0 where it was given in memory.
        files_after: bytes of the files that were written; 0 where none were.
        bytes_before: of all tensors of the model that was given.
        bytes_after: of all tensors of the rewritten model.
        parity: how its outputs compare with the original's, or why they were not compared; None where nobody asked.
        model: name of the model that was given; empty where it has none.
        rules: the rule set in full; None where it is not known.
        sizes: bytes by family of roles, the largest first; they add up to ``bytes_before`` and ``bytes_after``.
        provenance: versions, date and command of the run, and what had been done to the model before.
        misfits: nodes of the rewritten model that the target refuses, or computes wrongly.
        sized: what a budget was asked for and chose; None where there was none.
        quality: how well the rewritten model predicts tokens, beside the original; None where that was not measured.
        already_quantized: operator -> nodes of the given model that hold quantized weights and were left as they are.
    """

    rule_set: str
    target: str
    applications: tuple[Application, ...] = ()
    declines: tuple[Decline, ...] = ()
    proofs: tuple[Proof, ...] = ()
    weights: tuple[Weight, ...] = ()
    left: tuple[Left, ...] = ()
    sweeps: Mapping[str, int] = field(default_factory=dict)
    files_before: int = 0
    files_after: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    parity: Comparison | None = None
    model: str = ""
    rules: UsedRuleSet | None = None
    sizes: tuple[Size, ...] = ()
    misfits: tuple[Misfit, ...] = ()
    already_quantized: Mapping[str, int] = field(default_factory=dict)
    sized: Sized | None = None
    quality: Quality | None = None
    provenance: Provenance = field(default_factory=Provenance)

    def __repr__(self) -> str:
        """Sums it up: whole, it may have a line for each of ten thousand nodes."""
        counts = f"{len(self.applications):,} applications, {len(self.declines):,} declines"
        return f"<Report of {self.rule_set} for {self.target}: {counts}, {self.shrunk}>"

    @property
    def shrunk(self) -> str:
        """Size before and after, in words: of the files where both are known, else of all tensors."""
        if self.files_before and self.files_after:
            return shrink(self.files_before, self.files_after)
        return shrink(self.bytes_before, self.bytes_after)

    @property
    def applied(self) -> dict[str, int]:
        """Rule -> number of applications."""
        return dict(Counter(a.rule for a in self.applications))

    @property
    def declined(self) -> dict[tuple[str, str], int]:
        """(Rule, reason) -> number of declines, most frequent first."""
        return dict(Counter((d.rule, d.reason) for d in self.declines).most_common())

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """The declines by rule and reason, what matters most first."""
        return refusals(self.declines, self.left)

    @property
    def by_role(self) -> tuple[RoleSummary, ...]:
        """The quantized weights summed up by role, the most bytes first."""
        return summarize(self.weights)

    @property
    def on_grids(self) -> tuple[str, ...]:
        """What is to be said of weights that lie, or nearly lie, on a grid of few bits, a line for each kind."""
        return on_grids(self.weights)

    @property
    def changes(self) -> tuple[Change, ...]:
        """Where the form of a weight is another than the plan says, and why."""
        return changes(self.weights)

    @property
    def by_layer(self) -> tuple[LayerError, ...]:
        """The output errors of the weights by layer and role, the worst first; empty without a calibration."""
        return by_layer(self.weights)

    def to_json(self) -> dict[str, Any]:
        """Returns the report as plain JSON data; see ``document``."""
        found = document(self)
        errors = [{**_plain(dataclasses.asdict(error)), "worst": error.worst.name} for error in self.by_layer]
        more = {"applied": self.applied, "output_errors": errors}
        return {"schema_version": found.pop("schema_version"), **more, **found}


def document(record: Any) -> dict[str, Any]:
    """Returns a record as plain JSON data, with the version of its schema.

    JSON has no infinity and no NaN: they are the strings ``inf``, ``-inf`` and ``nan``.

    Args:
        record: a frozen dataclass, as a ``Report`` or a ``Comparison``.
    """
    plain: dict[str, Any] = _plain(dataclasses.asdict(record))
    return {"schema_version": SCHEMA_VERSION, **plain}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
