"""Declines in groups: what a rule refused for one reason, and what stays float for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rewriter.report.records import Decline, Left


@dataclass(frozen=True)
class Refusal:
    """One reason for which a rule declined.

    Attributes:
        rule: its name.
        reason: why it did not fire.
        declines: where, in the order of the run.
        nbytes: of the weights that stay float where it declined.
    """

    rule: str
    reason: str
    declines: tuple[Decline, ...]
    nbytes: int

    @property
    def expected(self) -> bool:
        """Whether the rule set means it so, or the rule is about other weights."""
        return self.declines[0].expected

    @property
    def failed(self) -> bool:
        """Whether a proof failed, so that the rule is wrong here."""
        return self.declines[0].failed

    @property
    def remedy(self) -> str:
        """What would have to change for the rule to fire; empty where nothing is known."""
        return self.declines[0].remedy


def refusals(declines: Iterable[Decline], left: Iterable[Left]) -> tuple[Refusal, ...]:
    """Returns the declines by rule and reason: what failed first, then what was not expected, by bytes and count."""
    groups: dict[tuple[str, str], list[Decline]] = {}
    for decline in declines:
        groups.setdefault((decline.rule, decline.reason), []).append(decline)
    nbytes = dict.fromkeys(groups, 0)
    for weight in left:
        if (weight.rule, weight.reason) in nbytes:
            nbytes[weight.rule, weight.reason] += weight.nbytes
    found = [Refusal(*key, tuple(group), nbytes[key]) for key, group in groups.items()]
    return tuple(
        sorted(
            found, key=lambda refusal: (not refusal.failed, refusal.expected, -refusal.nbytes, -len(refusal.declines))
        )
    )
