"""Which rules came nearest to a node, and what stopped each: seen while the run goes on."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import onnx_ir as ir

from rewriter.facts import DeclineTracer
from rewriter.run import ModelRun
from rewriter.stored import all_nodes


@dataclass(frozen=True)
class Near:
    """A rule that was tried at a node and did not fire.

    Attributes:
        rule: its name; of a recogniser that states facts for rules, empty.
        phase: the phase in which it was tried.
        node: the node, or the value that a recogniser almost knew.
        reason: the guard that stopped it; empty where the rule is about something else.
        culprit: the value or node at fault; empty where it is the node itself.
        declined: whether its pattern was there, so that it declined.
    """

    rule: str
    phase: str
    node: str
    reason: str
    culprit: str
    declined: bool


class Nearest:
    """Looks on, and keeps what concerns a few nodes."""

    def __init__(self, nodes: Collection[str], values: Collection[str]) -> None:
        """Prepares.

        Args:
            nodes: names of the nodes at which rules are of interest.
            values: names of the values about which recognisers are of interest.
        """
        self._nodes = nodes
        self._values = values
        self._attempts: dict[tuple[str, str, str], Near] = {}
        self._unknown: dict[str, Near] = {}

    def attempted(self, phase: str, rule: str, node: ir.Node, how: DeclineTracer) -> None:
        """Keeps the last attempt of each rule at each node of interest."""
        name = node.name or node.op_type
        if name in self._nodes:
            reason = how.reason or how.mismatch
            culprit = (how.culprits[0].name or "") if how.culprits else ""
            near = Near(rule, phase, name, reason, "" if culprit == name else culprit, bool(how.reason))
            self._attempts[phase, rule, name] = near

    def settled(self, phase: str, run: ModelRun) -> None:
        """Asks the recognisers why they state nothing about the values of interest."""
        for node in all_nodes(run.model):
            for value in node.outputs:
                name = value.name or ""
                if name in self._values and (reason := run.facts.why_not(value)):
                    self._unknown[name] = Near("", phase, name, reason, node.name or "", declined=True)

    @property
    def attempts(self) -> tuple[Near, ...]:
        """The rules that came nearest, the nearest first: those that declined, then those of another pattern."""
        return tuple(sorted(self._attempts.values(), key=lambda near: (not near.declined, not near.reason)))

    @property
    def unknown(self) -> tuple[Near, ...]:
        """The values that a recogniser almost knew."""
        return tuple(self._unknown.values())
