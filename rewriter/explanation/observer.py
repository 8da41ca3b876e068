"""Notes during a run which rules were tried at some nodes, and what stopped each."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from rewriter.engine.context import ModelRun
from rewriter.facts import DeclineTracer
from rewriter.graph.contents import all_nodes, name_of
from rewriter.report import Decline


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
        self._attempts: dict[tuple[str, str, str], Decline] = {}
        self._others: dict[tuple[str, str, str], None] = {}
        self._unknown: dict[str, Decline] = {}

    def attempted(self, phase: str, rule: str, node: ir.Node, how: DeclineTracer) -> None:
        """Keeps the last attempt of each rule at each node of interest."""
        name = name_of(node)
        if name not in self._nodes:
            return
        key = (phase, rule, name)
        self._attempts.pop(key, None)
        self._others.pop(key, None)
        if how.reason:
            self._attempts[key] = how.record(rule, phase, node)
        else:
            self._others[key] = None

    def settled(self, phase: str, run: ModelRun) -> None:
        """Asks the recognisers why they state nothing about the values of interest."""
        for node in all_nodes(run.model):
            for value in node.outputs:
                name = value.name or ""
                if name in self._values and (reason := run.facts.why_not(value)):
                    self._unknown[name] = Decline("", phase, name, str(reason), name_of(node), reason.remedy)

    @property
    def attempts(self) -> tuple[Decline, ...]:
        """The rules whose pattern was there and that declined."""
        return tuple(self._attempts.values())

    @property
    def others(self) -> tuple[tuple[str, str], ...]:
        """Rules that were tried and are about something else, each with the node."""
        return tuple((rule, node) for _, rule, node in self._others)

    @property
    def unknown(self) -> tuple[Decline, ...]:
        """The values that a recogniser almost knew, with an empty rule."""
        return tuple(self._unknown.values())
