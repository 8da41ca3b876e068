"""``--size`` and ``--bits``: a rule set whose forms are chosen by what they cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rewriter.cli.console import console, labelled, working
from rewriter.errors import UsageError
from rewriter.ruleset import RuleSet
from rewriter.text import nbytes


def fitted(
    model: Path,
    base: str,
    rule_set: RuleSet,
    size: int | None,
    bits: float | None,
    write_plan: Path | None,
    quiet: bool,
    **options: Any,
) -> RuleSet:
    """Returns the rule set with the forms of least error within the budget, and says what more or less would change.

    Args:
        model: the file.
        base: name or file of the rule set.
        rule_set: the same, with what the command line changes in it.
        size: bytes of the whole model, or None.
        bits: of each quantized weight, or None; one of the two.
        write_plan: file for the rule set that was found.
        quiet: print nothing.
        options: of ``apply``.

    Raises:
        UsageError: not one of size and bits, or too few of them.
    """
    from rewriter.budget.measured import measure
    from rewriter.budget.plan import chosen, fit, plan_text

    if (size is None) == (bits is None):
        raise UsageError("give one of --size and --bits; --write-plan goes with it")
    with working("measuring what each form costs", quiet=quiet):
        budget = measure(model, rule_set, **options)
        total = budget.bytes_of(bits) if bits is not None else size or 0
        budget, choice = fit(model, rule_set, budget, total, **options)
    screen = console(quiet=quiet)
    taken = f"{nbytes(total)}; the forms chosen take {nbytes(choice.nbytes)}"
    screen.print(labelled("Budget", f"{taken}{f', expected KL {choice.error:.4f}' if budget.tokens else ''}"))
    for step, what in ((budget.elements // 8, "more"), (-budget.elements // 8, "less")):
        try:
            other = budget.choose(choice.nbytes + step)
        except UsageError:
            continue
        factor = other.error / choice.error if choice.error else 1.0
        error = f"KL {other.error:.4f}, " if budget.tokens else ""
        screen.print(labelled("", f"one bit {what} ({nbytes(other.nbytes)}): {error}{factor:.2f} times the error"))
    if write_plan is not None:
        own = str(Path(base).resolve()) if Path(base).is_file() else base
        write_plan.write_text(plan_text(rule_set, choice, own), encoding="utf-8")
        screen.print(labelled("Plan", write_plan), soft_wrap=True)
    return chosen(rule_set, choice)
