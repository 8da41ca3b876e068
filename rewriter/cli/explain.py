"""``rewriter explain``: a dry run that says what would fire, what would not, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from rewriter.cli import options
from rewriter.cli.options import DEFAULT_RULES, Model, Rules, Settings, Target

if TYPE_CHECKING:
    from rich.console import Console

    from rewriter.api import Result
    from rewriter.cli.concerns import Concern

_LARGEST = 5
"""Weights left in float that are worth a line each."""


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
    from rewriter.cli.concerns import concern
    from rewriter.cli.console import console, working
    from rewriter.io import load

    rule_set = options.rule_set(rules, settings, "none")
    with working(f"reading {model}", quiet=False) as tell:
        original = load(model)
        result: Result[Any] = api.apply(
            original,
            rule_set,
            target=target,
            prover=lambda rewrite, run: None,
            progress=lambda phase, count: tell(f"{phase}: {count:,} rewrites"),
        )
    if name is None:
        _show_model(console(), f"{model}", result)
    else:
        _show_concern(console(), concern(name, original, result), result)


def _show_model(screen: Console, model: str, result: Result[Any]) -> None:
    from rich.text import Text

    from rewriter.cli import show
    from rewriter.cli.console import labelled, nbytes, rest, shrink, table
    from rewriter.cli.forecast import left_in_float, planned
    from rewriter.report import summarize

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


def _show_concern(screen: Console, found: Concern, result: Result[Any]) -> None:
    from dataclasses import replace

    from rich.text import Text

    from rewriter.cli import show

    report = replace(result.report, applications=found.applications, declines=found.declines)
    screen.print(Text.assemble((found.name, "bold"), f"  {found.what}"), soft_wrap=True)
    screen.print()
    show.show(screen, show.would_fire(report), show.declined(report, ""))
    for culprit in dict.fromkeys(d.culprit for d in found.declines if d.culprit):
        screen.print(Text(f"At fault: '{culprit}'"), soft_wrap=True)
    if not found.applications and not found.declines:
        screen.print(f"No rule of {report.rule_set} came near it.")
