"""What a budget chose, as overrides of a rule set's plan, and as a rule set in YAML that gives the same model again."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import yaml

from rewriter import api
from rewriter.budget.forms import Budget, Choice
from rewriter.budget.goal import Goal
from rewriter.budget.samples import group_jobs, model_bytes, quantized_jobs
from rewriter.errors import UsageError
from rewriter.io import Model
from rewriter.quantize.plan import Override, Selector
from rewriter.quantize.types import WeightSpec
from rewriter.report.sized import Sized, SizeGiven
from rewriter.ruleset import RuleSet

_CHOSEN = ("bits", "block_size", "symmetric")


def with_choice(rule_set: RuleSet, choice: Choice) -> RuleSet:
    """Returns the rule set with what was chosen as the last overrides of its plan."""
    added = tuple(
        Override(
            Selector(role=(role,), layers=tuple(range(layer, layer + 1) for layer in layers)),
            {name: getattr(spec, name) for name in _CHOSEN},
        )
        for role, spec, layers in _merged(choice)
    )
    plan = dataclasses.replace(rule_set.plan, overrides=(*rule_set.plan.overrides, *added))
    return dataclasses.replace(rule_set, plan=plan)


def fit(model: Model, rule_set: RuleSet, budget: Budget, goal: Goal, **options: Any) -> tuple[Budget, Choice]:
    """Chooses forms that the rules and the target take: one that they decline is not chosen again.

    Args:
        model: as ``apply`` takes it.
        rule_set: what was measured.
        budget: what was measured of it.
        goal: what is asked for.
        options: of ``apply``: calibration, imatrix, target.

    Returns:
        The budget, less the forms that are not taken, and what was chosen.

    Raises:
        UsageError: no forms are small, or good, enough.
    """
    while True:
        choice, total = goal.choose(budget), goal.total(budget)
        result = api.apply(model, with_choice(rule_set, choice), prover=lambda *_: None, **options)
        found = group_jobs(quantized_jobs(result))
        groups = []
        for group, form in choice.forms.items():
            jobs = found.get((group.role, group.layer), [])
            taken = len(jobs) == group.count and all(job.context.spec == form.spec for job in jobs)
            forms = group.forms if taken else tuple(other for other in group.forms if other != form)
            if not forms:
                raise UsageError(f"no form of {group.role} that was measured is one that the target takes")
            groups.append(dataclasses.replace(group, forms=forms))
        size = model_bytes(result.ir_model)
        if tuple(groups) == budget.groups and (total is None or size <= total):
            return budget, dataclasses.replace(choice, nbytes=size)
        missing = max(size - choice.nbytes, 0) if tuple(groups) == budget.groups else 0
        budget = dataclasses.replace(budget, groups=tuple(groups), rest=budget.rest + missing)


def explain_choice(budget: Budget, choice: Choice, goal: Goal) -> Sized:
    """Returns why these forms: what was asked for, and what other sizes would give."""
    whole = 1.0 if budget.tokens else choice.error or 1.0
    taken = {other.nbytes: other for other in budget.beside(choice.nbytes) if other.forms != choice.forms}
    least, found = math.inf, []
    for other in sorted([choice, *taken.values()], key=lambda other: other.nbytes):
        if other is choice or other.error < least:  # what takes more and is no better, nobody asks for
            found.append(SizeGiven(other.nbytes, budget.bits_of(other.nbytes), other.error / whole, other is choice))
        least = min(least, other.error)
    return Sized(str(goal), budget.tokens, tuple(found))


def plan_text(rule_set: RuleSet, choice: Choice, base: str) -> str:
    """Returns a rule set in YAML that extends ``base`` by what was chosen."""
    default = {name: getattr(rule_set.plan.default, name) for name in ("algorithm", *_CHOSEN)}
    overrides: list[dict[str, Any]] = []
    for role, spec, layers in _merged(choice):
        where = {"layers": list(layers)} if layers else {}
        overrides.append({"role": role, **where, **{name: getattr(spec, name) for name in _CHOSEN}})
    document = {
        "description": f"As {base}, in forms chosen for a model of {choice.nbytes:,} bytes.",
        "extends": base,
        "quantization": {"default": default, "overrides": overrides},
    }
    return yaml.safe_dump(document, sort_keys=False)


def _merged(choice: Choice) -> list[tuple[str, WeightSpec, tuple[int, ...]]]:
    """Role, form and layers; layers of a role that have one form together."""
    found: dict[tuple[str, WeightSpec], list[int]] = {}
    for group, form in choice.forms.items():
        layers = found.setdefault((group.role, form.spec), [])
        layers += [] if group.layer is None else [group.layer]
    return [(role, spec, tuple(layers)) for (role, spec), layers in found.items()]
