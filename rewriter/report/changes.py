"""Where the nearest form that the target runs took the place of the planned one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rewriter.report.records import Weight


@dataclass(frozen=True)
class Change:
    """Weights of one role whose form is another than the plan says.

    Attributes:
        role: what they are for; empty where the structure does not tell.
        planned: the form that the plan asked for.
        written: the form that was taken.
        because: why.
        weights: which.
    """

    role: str
    planned: str
    written: str
    because: str
    weights: tuple[Weight, ...]

    def __str__(self) -> str:
        return f"{self.planned} -> {self.written}: {self.because}"


def changes(weights: Iterable[Weight]) -> tuple[Change, ...]:
    """Returns the changes of the plan, those of most weights first."""
    groups: dict[tuple[str, str, str, str], list[Weight]] = {}
    for weight in weights:
        if weight.planned_form:
            key = (weight.role, weight.planned_form, weight.form, weight.because)
            groups.setdefault(key, []).append(weight)
    found = (Change(*key, tuple(sorted(group, key=lambda w: w.name))) for key, group in groups.items())
    return tuple(sorted(found, key=lambda change: (-len(change.weights), change.role)))
