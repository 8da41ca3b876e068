"""A report as one HTML file that a person reads: no network, no scripts, light and dark."""

from __future__ import annotations

import functools
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from rewriter.html.figures import Figures
from rewriter.html.heat import coverage_map
from rewriter.report import Comparison, Quality, Report
from rewriter.report.candidates import Candidates
from rewriter.report.coverage import Coverage
from rewriter.text import figure, nbytes, plural

GENERATOR = "onnx-moe-rewriter"
"""What the page says wrote it."""


def page(report: Report) -> str:
    return _render("page.html.j2", f=Figures(report))


def fragment(report: Report) -> str:
    """Returns what a notebook shows: the page's body with its style, which touches nothing outside of it."""
    return _render("fragment.html.j2", f=Figures(report))


def coverage_page(coverage: Coverage) -> str:
    counts = [count for block in coverage.blocks for count in block.counts]
    low, high = min(counts, default=0), max(counts, default=0)
    return _render("coverage.html.j2", c=coverage, map=coverage_map(coverage.blocks), low=low, high=high)


def candidates_page(candidates: Candidates) -> str:
    return _render("candidates.html.j2", c=candidates, table=candidates.table)


def check_page(before: str, after: str, inputs: str, found: Comparison | Quality) -> str:
    """Returns how far two models are apart.

    Args:
        before: name of the model as it should be.
        after: name of the model that was measured.
        inputs: what both were run on.
        found: what was measured.
    """
    outputs = found.worst_first if isinstance(found, Comparison) else None
    return _render("check.html.j2", before=before, after=after, inputs=inputs, found=found, outputs=outputs)


def _render(name: str, **values: Any) -> str:
    return _environment().get_template(name).render(values, generator=GENERATOR)


@functools.cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("rewriter.html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(nbytes=nbytes, figure=figure, count="{:,}".format, percent=_percent, plural=plural)
    return made


def _percent(value: float | None, digits: int = 2) -> str:
    return figure(value, f".{digits}%")
