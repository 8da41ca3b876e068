"""``--size``, ``--bits`` and ``--max-kl``: a rule set whose forms are chosen by what they cost."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rewriter.budget.goal import Goal
from rewriter.cli.console import console, labelled, show, working
from rewriter.cli.tables import sizes
from rewriter.errors import UsageError
from rewriter.report.sized import Sized
from rewriter.ruleset import RuleSet
from rewriter.text import nbytes


def fit_to_goal(
    model: Path,
    base: str,
    rule_set: RuleSet,
    goal: Goal,
    write_plan: Path | None,
    tokens: Path | None,
    *,
    quiet: bool,
    **options: Any,
) -> tuple[RuleSet, Sized]:
    """Returns the rule set with the forms that reach a goal, and why these; prints it with what other sizes would give.

    Args:
        model: the file.
        base: name or file of the rule set.
        rule_set: the same, with what the command line changes in it.
        goal: what is asked for.
        write_plan: file for the rule set that was found.
        tokens: what the result will be measured on, or None.
        quiet: print nothing.
        options: of ``apply``.

    Raises:
        UsageError: not one goal, or one that cannot be reached.
    """
    from rewriter.budget.measured import measure
    from rewriter.budget.plan import explain_choice, fit, plan_text, with_choice

    if [goal.nbytes, goal.bits, goal.kl].count(None) != 2:
        raise UsageError("give one of --size, --bits and --max-kl; --write-plan goes with it")
    if goal.kl is not None and options.get("calibration") is None:
        raise UsageError("--max-kl takes a calibration on tokens (--calibration FOLDER): what rewriter calibrate wrote")
    with working("measuring what each form costs", quiet=quiet) as tell:
        budget = measure(model, rule_set, require=goal.require, tell=tell, **options)
        tell("choosing forms")
        budget, choice = fit(model, rule_set, budget, goal, **options)
    screen = console(quiet=quiet)
    why = explain_choice(budget, choice, goal)
    expected = f", expected KL {choice.error:.4f}" if budget.tokens else ""
    screen.print(labelled("Budget", f"{why.asked}; the forms chosen take {nbytes(choice.nbytes)}{expected}"))
    if goal.kl is not None and tokens is None:
        screen.print(labelled("", f"measure it: rewriter check {model} OUTPUT --tokens FILE.npy --max-kl {goal.kl:g}"))
    if write_plan is not None:
        own = os.path.relpath(Path(base).resolve(), write_plan.resolve().parent) if Path(base).is_file() else base
        write_plan.write_text(plan_text(rule_set, choice, own), encoding="utf-8")
        screen.print(labelled("Plan", write_plan), soft_wrap=True)
    screen.print()
    show(screen, sizes(why))
    return with_choice(rule_set, choice), why
