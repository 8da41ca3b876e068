"""``rewriter explain``: a dry run that says what would fire, what would not, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rewriter.cli import options
from rewriter.cli.options import DEFAULT_RULES, Model, Rules, Settings, Target

if TYPE_CHECKING:
    from rich.console import Console

    from rewriter.api import Result
    from rewriter.cli.concerns import Concern, Focus
    from rewriter.cli.watching import Near

_LARGEST = 5
"""Weights left in float that are worth a line each."""

_NEAREST = 12
"""Reasons of one kind that are worth some lines each."""


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
    stopped = [near for near in found.near if near.declined]
    others = sorted({near.rule for near in found.near if not near.declined} - {near.rule for near in stopped})
    _say(screen, "What stopped the rules that came nearest", stopped, focus)
    _say(screen, "What was not recognised", found.unknown, focus)
    _say(screen, "What stopped rules further on in the same block", found.further, focus)
    if others:
        screen.print(Text(f"Tried, and about something else: {', '.join(others)}."), soft_wrap=True)
    if found.untouched:
        screen.print(f"No rule of {report.rule_set} came near it.")


def _say(screen: Console, title: str, rows: Sequence[Near], focus: Focus) -> None:
    """The guard, the value at fault, and what would have to change, for each reason once."""
    from rich.text import Text

    from rewriter.cli.console import labelled
    from rewriter.cli.hints import hint

    groups: dict[tuple[str, str], list[Near]] = {}
    for row in rows:
        groups.setdefault((row.rule, row.reason), []).append(row)
    if groups:
        screen.print(Text(title, "bold"))
    for (rule, reason), group in list(groups.items())[:_NEAREST]:
        first = group[0]
        more = f" and {len(group) - 1:,} more" if len(group) > 1 else ""
        screen.print(Text(f"{rule} at '{first.node}'{more}" if rule else f"'{first.node}'{more}"), soft_wrap=True)
        fault = first.culprit or first.node
        about = focus.about(fault)
        for label, text in (
            ("stopped by", reason),
            ("at fault", f"'{fault}'{f', {about}' if about else ''}"),
            ("to change it", hint(reason)),
        ):
            if text:
                screen.print(labelled(f"  {label}", text, 16), soft_wrap=True)
    if len(groups) > _NEAREST:
        screen.print(f"and {len(groups) - _NEAREST:,} more", style="dim")
    if groups:
        screen.print()
