"""Quantized weights summed up: by role, by layer, those in another form than planned, and those trained in few bits."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from rewriter.report.records import RoleSummary, Weight
from rewriter.text import names

KEPT = "kept as it was trained"
"""What ``Weight.grid`` says of a weight that lies on a grid and is written as that."""


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


@dataclass(frozen=True)
class LayerError:
    """The quantized weights of one role in one layer.

    Attributes:
        layer: its index; None for what belongs to no layer.
        role: what they are for; empty where the structure does not tell.
        count: how many there are whose output error is known.
        mean: of their output errors.
        largest: of them.
        worst: the weight that has it.
    """

    layer: int | None
    role: str
    count: int
    mean: float
    largest: float
    worst: Weight


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


def by_layer(weights: Iterable[Weight]) -> tuple[LayerError, ...]:
    """Sums the output errors of weights up by layer and role, the largest mean first."""
    groups: dict[tuple[int | None, str], list[tuple[float, Weight]]] = {}
    for weight in weights:
        if weight.output_rms is not None:
            groups.setdefault((weight.layer, weight.role), []).append((weight.output_rms, weight))
    found = [
        LayerError(
            layer,
            role,
            len(group),
            sum(error for error, _ in group) / len(group),
            *max(group, key=lambda entry: entry[0]),
        )
        for (layer, role), group in groups.items()
    ]
    return tuple(sorted(found, key=lambda e: (-e.mean, -1 if e.layer is None else e.layer, e.role)))


def changes(weights: Iterable[Weight]) -> tuple[Change, ...]:
    """Returns the changes of the plan, those of most weights first."""
    groups: dict[tuple[str, str, str, str], list[Weight]] = {}
    for weight in weights:
        if weight.planned_form:
            key = (weight.role, weight.planned_form, weight.form, weight.because)
            groups.setdefault(key, []).append(weight)
    found = (Change(*key, tuple(sorted(group, key=lambda w: w.name))) for key, group in groups.items())
    return tuple(sorted(found, key=lambda change: (-len(change.weights), change.role)))


def on_grids(weights: Iterable[Weight]) -> tuple[str, ...]:
    """Returns a line for each form in which weights are kept, and for each block that kept weights from their grid."""
    kept: dict[str, Counter[str]] = {}
    left: dict[str, list[Weight]] = {}
    for weight in weights:
        if weight.grid == KEPT:
            kept.setdefault(_form(weight), Counter())[weight.role or "of no role"] += 1
        elif weight.grid:
            left.setdefault(weight.grid, []).append(weight)
    lines = [
        f"kept as trained, {form}: {names([f'{count:,} {role}' for role, count in sorted(roles.items())])}"
        for form, roles in sorted(kept.items())
    ]
    for why, those in left.items():
        first = those[0]
        whom = f"'{first.name}'" if len(those) == 1 else f"{len(those):,} weights that are held together"
        lines.append(f"{why}; {first.algorithm} took {whom} in {_form(first)}")
    return tuple(lines)


def _form(weight: Weight) -> str:
    if weight.format != "int":
        return weight.format
    block = f"blocks of {weight.block_size}" if weight.block_size else "one scale per output"
    return f"{weight.bits} bits, {block}{'' if weight.symmetric else ', zero points'}"
