"""How models are drawn for a property, and what is remembered of those that were."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from hypothesis import HealthCheck, Phase, Verbosity, settings

from rewriter.report import Report

_SHOWN = 3
SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example, HealthCheck.filter_too_much)
"""What a test that draws models and runs each of them fails, and is no fault of it."""


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
        happened: what statistics show -> on how many models, near misses included.
    """

    rule: str
    fired: int = 0
    declined: Counter[str] = field(default_factory=Counter)
    drawn: int = 0
    happened: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        for watcher in _watchers:
            watcher.append(self)

    def add(self, report: Report) -> None:
        self.drawn += 1
        self.fired += sum(report.applied.values())
        self.declined.update(reason for _, reason in report.declined)
        self.note(report)

    def note(self, report: Report, where: str = "") -> None:
        """Counts a run for statistics alone."""
        self.happened.update(f"{where}{name} fired" for name in report.applied)
        self.happened.update({f"{where}{name} declined: {_general(reason)}" for name, reason in report.declined})

    def statistics(self) -> str:
        """Returns what happened, the most frequent first, a line each."""
        lines = [f"  {count:5}  {what}" for what, count in self.happened.most_common()]
        return "\n".join([f"{self.rule}: {self.drawn} models drawn", *lines])

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


_watchers: list[list[Seen]] = []


@contextlib.contextmanager
def watched() -> Iterator[list[Seen]]:
    """Gives a list that fills with what every check sees while the context lasts."""
    _watchers.append([])
    try:
        yield _watchers[-1]
    finally:
        _watchers.pop()


def terse(profile: settings) -> settings:
    """Returns a profile that fails with one AssertionError, and prints nothing beside its message.

    The message holds the model as text; Hypothesis would add its ``repr`` (and, where the variable CI is set, a
    decorator that reproduces it), and seek lines of code to blame. Nor does it fail for being slow, as every run of a
    model is: a deadline holds only where it is other than the one that Hypothesis has where nobody sets any.
    """
    quiet = Verbosity.quiet if profile.verbosity is Verbosity.normal else profile.verbosity
    return settings(
        profile,
        deadline=None if profile.deadline == settings.get_profile("default").deadline else profile.deadline,
        report_multiple_bugs=False,
        suppress_health_check=[*profile.suppress_health_check, *SLOW],
        phases=[phase for phase in profile.phases if phase is not Phase.explain],
        verbosity=quiet,
        print_blob=False,
    )


def _general(reason: str) -> str:
    """The reason without its names and numbers, so that equal causes count together."""
    return re.sub(r"'[^']*'|\[[^\]]*\]|\d+", "_", reason)
