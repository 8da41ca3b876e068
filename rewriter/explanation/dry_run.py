"""A run of a rule set that quantizes, runs and writes nothing, as a report or about one name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypedDict, Unpack, overload

from rewriter import api, io
from rewriter.explanation.focus import Concern, Focus
from rewriter.report import Report
from rewriter.ruleset import RuleSetLike


class DryRun(TypedDict, total=False):
    """The options of :func:`explain`, for its types."""

    target: str | None
    overrides: Mapping[str, Any] | None
    progress: Callable[[str, int], None] | None


@overload
def explain(model: io.Model, name: None = None, rules: RuleSetLike = ..., **options: Unpack[DryRun]) -> Report: ...


@overload
def explain(model: io.Model, name: str, rules: RuleSetLike = ..., **options: Unpack[DryRun]) -> Concern: ...


def explain(
    model: io.Model,
    name: str | None = None,
    rules: RuleSetLike = api.DEFAULT_RULES,
    *,
    target: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> Report | Concern:
    """Says what a rule set would do to a model, what it would not and why, without doing it.

    Args:
        model: as for ``rewriter.apply``; it stays as it is.
        name: a node or a weight, a glob of their names, or a role, for only what concerns it.
        rules: as for ``rewriter.apply``.
        target: likewise.
        overrides: likewise.
        progress: told the phase and the number of rewrites so far.

    Returns:
        A report whose weights have no errors and whose rewrites have no proofs; or what concerns ``name``.

    Raises:
        UsageError: nothing in the model has this name.
        RewriterError: as ``rewriter.apply``.
    """
    return explain_with_focus(model, name, rules, target=target, overrides=overrides, progress=progress)[0]


def explain_with_focus(
    model: io.Model, name: str | None, rules: RuleSetLike, **options: Unpack[DryRun]
) -> tuple[Report | Concern, Report, Focus | None]:
    """Returns what ``explain`` does, the report, and what was looked at of a name."""
    original = io.as_model(model)
    focus = None if name is None else Focus(name, original)
    watch = None if focus is None else focus.watch
    result = api.apply(original, rules, prover=lambda rewrite, run: None, watch=watch, **options)
    label = os.fspath(model) if isinstance(model, str | os.PathLike) else result.report.model
    report = replace(result.report, model=label)
    return (report if focus is None else focus.concern(result)), report, focus
