"""A rule set as a report shows it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from rewriter.quantize.plan import QuantizationPlan
from rewriter.report import PlanLine, UsedPhase, UsedRule, UsedRuleSet
from rewriter.ruleset.model import RuleSet


def used(rule_set: RuleSet) -> UsedRuleSet:
    """Returns what a report says of the rule set that was run."""
    return UsedRuleSet(
        name=rule_set.name,
        description=rule_set.description,
        phases=tuple(
            UsedPhase(phase.name, tuple(UsedRule(rule.name, dict(rule.options)) for rule in phase.rules))
            for phase in rule_set.phases
        ),
        plan=tuple(_lines(rule_set.plan)),
        parity=asdict(rule_set.parity),
    )


def _lines(plan: QuantizationPlan) -> Iterator[PlanLine]:
    yield PlanLine("default", "", asdict(plan.default))
    for kind, selectors in (("include", plan.include), ("exclude", plan.exclude)):
        for selector in selectors:
            yield PlanLine(kind, str(selector), {})
    for override in plan.overrides:
        yield PlanLine("override", str(override.selector), dict(override.changes))
