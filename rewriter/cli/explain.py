"""``rewriter explain``: a dry run that says what would fire, what would not, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rewriter.cli import options
from rewriter.cli.options import DEFAULT_RULES, Model, Rules, Settings, Target

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from rewriter.api import Result
    from rewriter.cli.concerns import Concern, Focus
    from rewriter.cli.nearest import Near

_LARGEST = 5
"""Weights left in float that are worth a line each."""

_NEAREST = 12
"""Rules that did not fire that are worth a line each."""


def explain(
    model: Model,
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", show_default=False, help="A node or a weight: only what concerns it."),
    ] = None,
    rules: Rules = DEFAULT_RULES,
    target: Target = None,
    settings: Settings = [],
) -> None:
    """Say what a rule set would do to a model, what it would not and why, without doing it.

    Nothing is quantized, run or written.

    [bold]rewriter explain model.onnx[/bold]
        what moe-int4 would do, and the size that would come of it
    [bold]rewriter explain model.onnx -r experts-int8[/bold]
        the same for another rule set
    [bold]rewriter explain model.onnx lm_head.weight[/bold]
        what would happen to one weight or node
    """
    from rewriter import api
    from rewriter.cli.concerns import Focus
    from rewriter.cli.console import console, working
    from rewriter.io import load

    rule_set = options.rule_set(rules, settings, "none")
    with working(f"reading {model}", quiet=False) as tell:
        original = load(model)
        focus = None if name is None else Focus(name, original)
        result: Result[Any] = api.apply(
            original,
            rule_set,
            target=target,
            prover=lambda rewrite, run: None,
            progress=lambda phase, count: tell(f"{phase}: {count:,} rewrites"),
            watch=None if focus is None else focus.watch,
        )
    if focus is None:
        _show_model(console(), f"{model}", result)
    else:
        _show_concern(console(), focus.concern(result), focus, result)


def _show_model(screen: Console, model: str, result: Result[Any]) -> None:
    from rich.text import Text

    from rewriter.cli import show
    from rewriter.cli.console import labelled, rest, table
    from rewriter.cli.forecast import left_in_float, planned
    from rewriter.report import summarize
    from rewriter.wording import nbytes, shrink

    report = result.report
    head = f" on {model}, for {report.target}: a dry run, nothing is written\n"
    screen.print(Text.assemble((report.rule_set, "bold"), head))
    if not report.applications:
        screen.print("Nothing would fire.\n")
    show.show(
        screen,
        show.would_fire(report),
        show.declined(report, "; name a node or weight to see what concerns it"),
        show.weights(summarize(planned(result.ir_model)), measured=False, width=screen.width),
    )
    left = left_in_float(result.ir_model, report)
    if left:
        rows = table("Largest weights left in float", "weight", ">size", "read by", "why")
        for entry in left[:_LARGEST]:
            why = entry.reason or "no rule came near"
            rows.add_row(entry.name, nbytes(entry.nbytes), ", ".join(entry.readers), why)
        rest(rows, len(left) - _LARGEST, f", {nbytes(sum(entry.nbytes for entry in left[_LARGEST:]))}")
        show.show(screen, rows)
    screen.print(labelled("Size", shrink(report.bytes_before, report.bytes_after)))


def _show_concern(screen: Console, found: Concern, focus: Focus, result: Result[Any]) -> None:
    from dataclasses import replace

    from rich.text import Text

    from rewriter.cli import show

    report = replace(result.report, applications=found.applications)
    screen.print(Text.assemble((found.name, "bold"), f"  {found.what}"), soft_wrap=True)
    screen.print()
    show.show(screen, show.would_fire(report))
    for application in found.absorbed[:_LARGEST]:
        goes = f"Goes with the rewrite by {application.rule} at '{application.node}' (phase {application.phase})."
        screen.print(Text(goes), soft_wrap=True)
    show.show(screen, _nearest(found.near, focus))
    for title, rows in (("Not recognised", found.unknown), ("Further on in the same block", found.further)):
        if rows:
            screen.print(Text(title, "bold"))
        for row in rows[:_LARGEST]:
            rule = f"{row.rule} at " if row.rule else ""
            screen.print(Text(f"  {rule}'{row.node}': {row.reason}"), soft_wrap=True)
            _advise(screen, row.reason)
        if rows:
            screen.print()
    if found.untouched:
        screen.print(f"No rule of {report.rule_set} came near it.")


def _nearest(near: Sequence[Near], focus: Focus) -> Table | None:
    """What stopped each rule, the value at fault, and what would have to change."""
    from rewriter.cli.console import rest, table
    from rewriter.cli.hints import hint

    if not near:
        return None
    made = table("What came nearest, and what stopped it", "|rule", "node", "stopped by", "at fault", "to change it")
    for attempt in near[:_NEAREST]:
        fault = attempt.culprit or (attempt.node if attempt.declined else focus.operand(attempt.node))
        about = focus.about(fault)
        reason = attempt.reason or "its operands are not what the rule is about"
        made.add_row(attempt.rule, attempt.node, reason, f"{fault} ({about})" if about else fault, hint(reason) or "-")
    rest(made, len(near) - _NEAREST, "")
    return made


def _advise(screen: Console, reason: str) -> None:
    from rich.text import Text

    from rewriter.cli.hints import hint

    if advice := hint(reason):
        screen.print(Text(f"    to change it: {advice}", "dim"), soft_wrap=True)
