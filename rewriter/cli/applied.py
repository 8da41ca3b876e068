"""What ``rewriter apply`` prints of a run that is done: tables, where the files are, and what failed."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

from rewriter.cli import tables
from rewriter.cli.console import labelled, show
from rewriter.explanation.coverage import unread_experts
from rewriter.report import Report
from rewriter.ruleset import RuleSet


def show_report(screen: Console, done: Report, rule_set: RuleSet, model: Path, file: Path | None) -> None:
    """Prints what fired, what declined, errors, and how far the result is from the original.

    Args:
        screen: where to.
        done: the report of the run.
        rule_set: what was run.
        model: the model that was given.
        file: where the whole report is written, or None.
    """
    more = "; --report FILE.json lists all" if file is None else f"; see {file}"
    screen.print(Text.assemble((rule_set.name, "bold"), f" on {model}, for {done.target}\n"))
    for made in done.provenance.before:
        screen.print(labelled("Earlier", f"rewritten by {made}\n"), soft_wrap=True)
    if not done.applications:
        screen.print("Nothing fired: the output is the model as it was.\n")
    if unread := unread_experts(rule_set, done):
        screen.print(f"{unread}\n")
    show(
        screen,
        tables.fired(done),
        tables.declined(done.refusals, more),
        tables.misfits(done),
        tables.changed(done.changes, more),
        tables.plan(done.rules),
        tables.weights(done.by_role, measured=True),
        tables.output_errors(done.by_layer),
    )
    for line in (*done.on_grids, *filter(None, [tables.accepted(done.rules), tables.not_calibrated(done.weights)])):
        screen.print(f"{line[0].upper()}{line[1:]}.\n")
    if done.parity is not None and done.parity.runtime:
        title = f"Against the original ({done.parity.runtime}, random inputs, seed {done.parity.seed})"
        show(screen, tables.metrics(title, done.parity))
    elif done.parity is not None and done.parity.skipped:
        screen.print(f"Not compared with the original: {done.parity.skipped}.\n")
    if done.quality is not None:
        show(screen, tables.quality(done.quality))
    if done.already_quantized:
        kept = ", ".join(f"{count:,} {operator}" for operator, count in done.already_quantized.items())
        screen.print(f"Quantized already, left as they were: {kept}\n")


def show_files(screen: Console, done: Report, saved: Path, report: Path | None, page: Path | None) -> None:
    """Prints the size of the model, and where it and what tells of it are written."""
    screen.print(labelled("Size", f"{done.shrunk} on disk"))
    for label, file in (("Output", saved), ("Report", report), ("Page", page)):
        if file is not None:
            screen.print(labelled(label, file), soft_wrap=True)


def failures(done: Report, required: list[str]) -> list[str]:
    """Returns why the exit code is 1: wrong rewrites, limits that do not hold, required rules that never fired."""
    found = [f"rule {r.rule} at node {r.declines[0].node}: {r.reason}" for r in done.refusals if r.failed]
    for measured in (done.parity, done.quality):
        found += () if measured is None else measured.failures
    for rule in dict.fromkeys(required):
        if rule not in done.applied:
            reasons = [reason for name, reason in done.declined if name == rule]
            why = f"it declined: {reasons[0]}" if reasons else "nothing in the model matched it"
            found.append(f"required rule {rule} never fired: {why}")
    return found
