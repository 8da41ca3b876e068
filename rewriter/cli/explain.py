"""``rewriter explain``: a dry run that says what would fire, what would not, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from rewriter.cli import options
from rewriter.cli.options import DEFAULT_RULES, AsJson, Model, Rules, Settings, TargetName
from rewriter.text import shrink

if TYPE_CHECKING:
    from rich.console import Console

    from rewriter.explanation.focus import Concern, Focus
    from rewriter.report import Decline, Report

_LARGEST = 5
"""Weights left in float that are worth a line each."""

_NEAREST = 12
"""Reasons of one kind that are worth some lines each."""


def explain(
    model: Model,
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            show_default=False,
            help="A node or a weight, a glob of their names, or a role: only what concerns it.",
            autocompletion=options.complete_names,
        ),
    ] = None,
    rules: Rules = DEFAULT_RULES,
    target: TargetName = None,
    settings: Settings = [],
    as_json: AsJson = False,
) -> None:
    """Say what a rule set would do to a model, what it would not and why, without doing it.

    Nothing is quantized, run or written.

    [bold]rewriter explain model.onnx[/bold]
        what moe-int4 would do, and the size that would come of it
    [bold]rewriter explain model.onnx -r experts-int8[/bold]
        the same for another rule set
    [bold]rewriter explain model.onnx lm_head.weight[/bold]
        what would happen to one weight or node; lm_head, expert.down or '*.o_proj.*' to those of a role or glob
    [bold]rewriter explain model.onnx --json[/bold]
        the same for a program: a report as apply --report writes it, without errors and proofs
    """
    from rewriter.cli.console import console, print_json, working
    from rewriter.explanation.coverage import unread_experts
    from rewriter.explanation.dry_run import explain_with_focus
    from rewriter.report import Report, document

    rule_set = options.rule_set(rules, settings)
    with working(f"reading {model}", quiet=as_json) as tell:
        found, report, focus = explain_with_focus(
            model,
            name,
            rule_set,
            target=target,
            progress=lambda phase, count: tell(options.progress(phase, count)),
        )
    if as_json:
        print_json(found.to_json() if isinstance(found, Report) else document(found))
    elif isinstance(found, Report):
        _show_report(console(), report, unread_experts(rule_set, report))
    elif focus is not None:
        _show_concern(console(), found, focus, report)


def _show_report(screen: Console, report: Report, unread: str) -> None:
    from rich.text import Text

    from rewriter.cli import tables
    from rewriter.cli.console import labelled, show

    head = f" on {report.model}, for {report.target}: a dry run, nothing is written\n"
    screen.print(Text.assemble((report.rule_set, "bold"), head))
    if not report.applications:
        screen.print("Nothing would fire.\n")
    if unread:
        screen.print(f"{unread}\n")
    show(
        screen,
        tables.would_fire(report),
        tables.declined(report.refusals, "; --json lists all"),
        tables.misfits(report),
        tables.changed(report.changes, "; --json lists all"),
        tables.plan(report.rules),
        tables.weights(report.by_role, measured=False),
        tables.left(report.left, _LARGEST),
    )
    for line in report.on_grids:
        screen.print(f"{line[0].upper()}{line[1:]}.\n")
    screen.print(labelled("Tensors", shrink(report.bytes_before, report.bytes_after)))


def _show_concern(screen: Console, found: Concern, focus: Focus, report: Report) -> None:
    from rich.text import Text

    from rewriter.cli import tables
    from rewriter.cli.console import show

    screen.print(Text.assemble((found.name, "bold"), f"  {found.what}"), soft_wrap=True)
    screen.print()
    show(screen, tables.would_fire(replace(report, applications=found.applications)))
    for application in found.absorbed[:_LARGEST]:
        goes = f"Goes with the rewrite by {application.rule} at '{application.node}' (phase {application.phase})."
        screen.print(Text(goes), soft_wrap=True)
    _say(screen, "What stopped the rules that came nearest", found.declines, focus)
    _say(screen, "What was not recognised", found.unknown, focus)
    _say(screen, "What stopped rules further on in the same block", found.further, focus)
    if found.others:
        screen.print(Text(f"Tried, and about something else: {', '.join(found.others)}."), soft_wrap=True)
    if found.note:
        screen.print(found.note)
    if found.untouched:
        screen.print(f"No rule of {report.rule_set} came near it.")


def _say(screen: Console, title: str, rows: Sequence[Decline], focus: Focus) -> None:
    """The guard, the value at fault, and what would have to change, for each reason once."""
    from rich.text import Text

    from rewriter.cli.console import labelled

    groups: dict[tuple[str, str], list[Decline]] = {}
    for row in rows:
        groups.setdefault((row.rule, row.reason), []).append(row)
    if groups:
        screen.print(Text(title, "bold"))
    for (rule, reason), group in list(groups.items())[:_NEAREST]:
        first = group[0]
        more = f" and {len(group) - 1:,} more" if len(group) > 1 else ""
        screen.print(Text(f"{rule} at '{first.node}'{more}" if rule else f"'{first.node}'{more}"), soft_wrap=True)
        about = focus.about(first.culprit)
        for label, text in (
            ("stopped by", reason),
            ("at fault", f"'{first.culprit}'{f', {about}' if about else ''}"),
            ("to change it", first.remedy),
        ):
            if text:
                screen.print(labelled(f"  {label}", text, 16), soft_wrap=True)
    if len(groups) > _NEAREST:
        screen.print(f"and {len(groups) - _NEAREST:,} more", style="dim")
    if groups:
        screen.print()
