"""What the page shows of a report: groups, shares and cells, computed once so that the templates only lay them out."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from rewriter.html.heat import Grid, HeatMap, grid, heat_maps
from rewriter.report import Metrics, Proof, Report, Size
from rewriter.text import names

_FAMILIES = ("expert", "shared_expert", "mlp", "attention", "lm_head", "embedding", "router", "")
"""The families that have a colour of their own, in the order in which a bar shows them."""


Change = tuple[tuple[str, ...], tuple[str, ...]]
"""Operators that went, and operators that came."""


@dataclass(frozen=True)
class Fired:
    """A rule that fired.

    Attributes:
        rule: its name.
        count: how often.
        changes: what went and what came, of the most frequent change.
        proofs: of its structural classes, with how many applications rest on each, the largest error first.
        unproved: how many applications rest on none.
    """

    rule: str
    count: int
    changes: str
    proofs: tuple[tuple[Proof, int], ...]
    unproved: int

    @property
    def run(self) -> tuple[Proof, ...]:
        """The proofs that were run."""
        return tuple(proof for proof, _ in self.proofs if not proof.skipped)

    @property
    def error(self) -> float | None:
        """The largest error; None where nothing was run."""
        return max((proof.max_relative for proof in self.run), default=None)

    @property
    def runtimes(self) -> str:
        return names(sorted({proof.runtime for proof in self.run})) if self.run else ""


@dataclass(frozen=True)
class Segment:
    """A part of a bar.

    Attributes:
        kind: number of its colour.
        family: what it is.
        share: of the whole bar's width, 0 to 100.
        nbytes: its size.
    """

    kind: int
    family: str
    share: float
    nbytes: int


class Figures:
    """A report with what the templates need of it.

    Attributes:
        report: the report.
        examples: places that are named where a rule declined.
        groups: rows of a table that may be long.
    """

    examples = 5
    groups = 60

    def __init__(self, report: Report) -> None:
        self.report = report

    @cached_property
    def fired(self) -> tuple[Fired, ...]:
        """Every rule that fired, in the order in which they did."""
        changes: dict[str, Counter[Change]] = defaultdict(Counter)
        uses: dict[str, Counter[int | None]] = defaultdict(Counter)
        for application in self.report.applications:
            changes[application.rule][application.replaced, application.by] += 1
            uses[application.rule][application.proof] += 1
        return tuple(self._fired(rule, found, uses[rule]) for rule, found in changes.items())

    def _fired(self, rule: str, changes: Counter[Change], uses: Counter[int | None]) -> Fired:
        (((went, came), _),) = changes.most_common(1)
        change = f"{_listed(went)} → {_listed(came) or 'nothing'}"
        return Fired(rule, uses.total(), change, self._proofs(uses), uses[None])

    def _proofs(self, uses: Counter[int | None]) -> tuple[tuple[Proof, int], ...]:
        found = [(self.report.proofs[index], count) for index, count in uses.items() if index is not None]
        return tuple(sorted(found, key=lambda pair: -pair[0].max_relative))

    @cached_property
    def bars(self) -> tuple[tuple[str, int, tuple[Segment, ...]], ...]:
        """The model before and after: label, bytes, segments by family of roles."""
        before, after = self.report.bytes_before, self.report.bytes_after
        widest = max(before, after, 1)
        sizes = sorted(self.report.sizes, key=lambda size: _kind(size.family))
        return (
            ("before", before, _segments([(s, s.bytes_before) for s in sizes], widest)),
            ("after", after, _segments([(s, s.bytes_after) for s in sizes], widest)),
        )

    @property
    def legend(self) -> tuple[tuple[int, Size], ...]:
        """Number of its colour and size of each family."""
        return tuple((_kind(size.family), size) for size in self.report.sizes)

    @cached_property
    def heat_maps(self) -> tuple[HeatMap, ...]:
        """One for each role of experts."""
        return heat_maps(self.report.weights)

    @cached_property
    def grid(self) -> Grid | None:
        """Layers by role, for what is not an expert's."""
        return grid(self.report.weights)

    @cached_property
    def mean_error(self) -> float | None:
        """Mean over the weights that have been computed; None where there are none."""
        errors = [weight.relative_rms for weight in self.report.weights if not math.isnan(weight.relative_rms)]
        return sum(errors) / len(errors) if errors else None

    @cached_property
    def outputs(self) -> tuple[tuple[str, Metrics], ...]:
        """How the outputs of the two models differ; empty where they were not compared."""
        return () if self.report.parity is None else self.report.parity.worst_first


def _kind(family: str) -> int:
    return _FAMILIES.index(family) if family in _FAMILIES else len(_FAMILIES) - 1


def _segments(sizes: Sequence[tuple[Size, int]], widest: int) -> tuple[Segment, ...]:
    return tuple(
        Segment(_kind(size.family), size.family, 100 * nbytes / widest, nbytes) for size, nbytes in sizes if nbytes
    )


def _listed(operators: Sequence[str]) -> str:
    counted = Counter(operators)
    shown = [name if count == 1 else f"{count:,} {name}" for name, count in counted.most_common(4)]
    return ", ".join([*shown, f"{len(counted) - 4} more kinds"] if len(counted) > 4 else shown)
