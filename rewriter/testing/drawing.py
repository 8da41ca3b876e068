"""How models are drawn for a property, and what is remembered of those that were."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from hypothesis import HealthCheck, Phase, Verbosity, event, settings

from rewriter.report import Report

_SHOWN = 3


class NeverFiredError(AssertionError):
    """A rule fired on none of the drawn models, so that nothing was shown of it."""


@dataclass
class Seen:
    """What happened on the models that were drawn.

    Attributes:
        rule: the rule's name, as messages show it.
        fired: how often it fired.
        declined: reason -> on how many models.
        drawn: how many models there were.
    """

    rule: str
    fired: int = 0
    declined: Counter[str] = field(default_factory=Counter)
    drawn: int = 0

    def add(self, report: Report) -> None:
        """Counts a run, here and in Hypothesis' statistics."""
        self.drawn += 1
        self.fired += sum(report.applied.values())
        self.declined.update(reason for _, reason in report.declined)
        count(report)

    def require_fired(self) -> None:
        """Raises NeverFiredError where the rule did not; the message tells why it declined."""
        if self.fired:
            return
        reasons = "; ".join(f"{reason} ({n} models)" for reason, n in self.declined.most_common(_SHOWN))
        declined = f"it declined: {reasons}; " if reasons else ""
        raise NeverFiredError(
            f"{self.rule} fired on none of the drawn models ({self.drawn}), so nothing was shown of it; {declined}where"
            " it did not decline, its pattern matched nothing, it raised NotApplicable, or its rewrite returned None"
        )


def terse(profile: settings, *unhurried: HealthCheck) -> settings:
    """Returns a profile that fails with one AssertionError, and prints nothing beside its message.

    The message holds the model as text; Hypothesis would add its ``repr`` (and, where the variable CI is set, a
    decorator that reproduces it), and seek lines of code to blame.
    """
    quiet = Verbosity.quiet if profile.verbosity is Verbosity.normal else profile.verbosity
    return settings(
        profile,
        report_multiple_bugs=False,
        suppress_health_check=[*profile.suppress_health_check, *unhurried],
        phases=[phase for phase in profile.phases if phase is not Phase.explain],
        verbosity=quiet,
        print_blob=False,
    )


def count(report: Report, where: str = "") -> None:
    """Counts what happened in Hypothesis' statistics."""
    for name in report.applied:
        event(f"{where}{name} fired")
    for name, reason in report.declined:
        event(f"{where}{name} declined: {_general(reason)}")


def _general(reason: str) -> str:
    """The reason without its names and numbers, so that equal causes count together."""
    return re.sub(r"'[^']*'|\[[^\]]*\]|\d+", "_", reason)
