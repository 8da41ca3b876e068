"""A rule set as a report shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from rewriter.quantize.plan import LineUse
from rewriter.report import PlanLine, UsedPhase, UsedRule, UsedRuleSet
from rewriter.ruleset.model import RuleSet


def used(rule_set: RuleSet, use: Mapping[tuple[str, int], LineUse] | None = None) -> UsedRuleSet:
    """Returns what a report says of the rule set that was run.

    Args:
        rule_set: it.
        use: what each line of its plan came to; None where it was not run.
    """
    plan = rule_set.plan
    lines = [("default", 0, "", asdict(plan.default))]
    for kind, selectors in (("include", plan.include), ("exclude", plan.exclude)):
        lines += [(kind, index, str(selector), {}) for index, selector in enumerate(selectors)]
    for index, override in enumerate(plan.overrides):
        lines.append(("override", index, str(override.selector), dict(override.changes)))
    return UsedRuleSet(
        name=rule_set.name,
        description=rule_set.description,
        phases=tuple(
            UsedPhase(phase.name, tuple(UsedRule(rule.name, dict(rule.options)) for rule in phase.rules))
            for phase in rule_set.phases
        ),
        plan=tuple(
            PlanLine(kind, selects, values, *((None, None) if use is None else use[kind, index]))
            for kind, index, selects, values in lines
        ),
        parity=asdict(rule_set.parity),
        activations={
            "rounded_activations": rule_set.rounded_activations,
            "accuracy_level": rule_set.accuracy_level,
        },
    )
