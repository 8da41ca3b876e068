"""Facts about values: what recognisers state, computed forward, kept for the run and dropped where a commit touched."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import onnx_ir as ir
from onnxscript.rewriter import MatchingTracer, MatchStatus

from rewriter.errors import RuleError
from rewriter.facts.family import Transfer
from rewriter.graph._onnxscript import MatchFailureError
from rewriter.graph.contents import all_nodes, name_of
from rewriter.graph.declines import NOT_AN_INPUT, Reason, reason_of
from rewriter.report import Decline
from rewriter.tensors import View, constant

F = TypeVar("F")

_NONE = Reason("")
_OVERRIDABLE = Reason("a caller may override it: it is among the graph's inputs too", NOT_AN_INPUT)
_AGREED: ContextVar[bool] = ContextVar("recognisers must agree", default=False)


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """Within the block, two recognisers that state different facts of one kind for one value raise RuleError.

    Elsewhere the last one wins, as it does everywhere where a recogniser ``overrides`` what others state.
    """
    token = _AGREED.set(True)
    try:
        yield
    finally:
        _AGREED.reset(token)


class Facts:
    """Every fact about the values of one model, as a set of recognisers states them.

    A value that no caller can change (``tensors.constant``) has the fact ``View`` without any recogniser.
    """

    def __init__(self, model: ir.Model, recognisers: Iterable[Transfer], under: Facts | None = None) -> None:
        """Prepares facts; ``compute`` states them.

        Args:
            model: the model.
            recognisers: what states them.
            under: facts that these follow from, and that follow from none of these: constants. Whoever keeps both up
                to date does so with these first, and tells the ones above of the values that changed.
        """
        self._model = model
        self._under = under
        self._facts: dict[ir.Value, dict[type, object]] = {}
        self._layers: tuple[dict[ir.Value, dict[type, object]], ...] = (
            self._facts,
            *(() if under is None else under._layers),
        )
        self._derived: dict[ir.Value, dict[type, object]] = {}
        self._reasons: dict[ir.Value, Reason] = {}
        self._later: dict[ir.Node, None] = {}
        self._by_operator: dict[tuple[str, str], list[Transfer]] = {}
        for recogniser in recognisers:
            self._by_operator.setdefault((recogniser.domain, recogniser.op_type), []).append(recogniser)

    @property
    def opset(self) -> int:
        """Version of the standard operators that the model imports."""
        return self._model.graph.opset_imports.get("", 1)

    def get(self, value: ir.Value | None, kind: type[F]) -> F | None:
        """Returns what is known of ``value`` as a ``kind``, or None."""
        if value is None:
            return None
        for facts in self._layers:
            known: dict[type, Any] | None = facts.get(value)
            if known is not None and kind in known:
                found: F | None = known[kind]
                return found
        if kind is not View:
            return None
        producer = value.producer()
        if producer is not None and producer.op_type != "Constant":
            return None
        view = self._layers[-1].setdefault(value, {})[View] = constant(value)
        return view  # type: ignore[return-value]  # which the kind asked for is

    def of(self, value: ir.Value) -> Iterator[object]:
        """Yields every fact that has been stated about ``value``."""
        yield from self._facts.get(value, {}).values()
        if self._under is not None:
            yield from self._under.of(value)

    def derived(self, value: ir.Value, kind: type[F], compute: Callable[[], F]) -> F:
        """Returns a fact that follows from the graph around ``value``; computed once and kept with the others."""
        known = self._derived.setdefault(value, {})
        if kind not in known:
            known[kind] = compute()
        fact = known[kind]
        assert isinstance(fact, kind)
        return fact

    def kept(self, value: ir.Value, kind: type[F]) -> F | None:
        """Returns what ``derived`` has computed, or None where it was never called."""
        fact = self._derived.get(value, {}).get(kind)
        return fact if isinstance(fact, kind) else None

    def why_not(self, value: ir.Value | None) -> Reason:
        """Returns why a recogniser that came near stated nothing about ``value``; empty where none came near."""
        if value is None:
            return _NONE
        if value.is_initializer() and value.is_graph_input():
            return _OVERRIDABLE
        own = self._reasons.get(value, _NONE)
        return self._under.why_not(value) if self._under is not None and not own else own

    def own_reason(self, value: ir.Value) -> Reason:
        """As ``why_not``, without the reasons of the facts on which these recognisers build."""
        return self._reasons.get(value, _NONE)

    def compute(self) -> None:
        """States the facts of every node of the model, in topological order."""
        for node in all_nodes(self._model) if self._by_operator else ():
            if recognisers := self._by_operator.get((node.domain, node.op_type)):
                self._state(node, recognisers)

    def update(self, touched: Iterable[ir.Node]) -> list[ir.Value]:
        """States anew what a commit touched and whatever follows from it.

        Args:
            touched: nodes that came, or of whose inputs something else is known, or that read others now.

        Returns:
            The values about which something else is known now.
        """
        self.note(touched)
        changed: list[ir.Value] = []
        queue = deque([node for node in self._later if node.graph is not None])
        self._later.clear()
        while queue:
            node = queue.popleft()
            if self._visit(node):
                changed.extend(node.outputs)
                queue.extend(use.node for value in node.outputs for use in value.uses())
        return changed

    def note(self, touched: Iterable[ir.Node]) -> None:
        """Takes note of what a commit touched: it is stated anew by the next ``update`` or ``refresh``."""
        if self._by_operator:
            self._later.update(dict.fromkeys(touched))

    def refresh(self) -> None:
        """States anew, in one pass over the model, what follows from all that was noted; forgets what was derived."""
        self._derived.clear()
        touched, self._later = self._later, {}
        for node in all_nodes(self._model) if touched else ():
            if node in touched and self._visit(node):
                touched.update((use.node, None) for value in node.outputs for use in value.uses())

    def _visit(self, node: ir.Node) -> bool:
        """Recomputes the facts about the node's outputs; True where they changed."""
        recognisers = self._by_operator.get((node.domain, node.op_type))
        if recognisers is None:
            return False
        before = [self._facts.get(value) for value in node.outputs]
        for known in (self._facts, self._derived, self._reasons):
            for value in node.outputs:
                known.pop(value, None)
        self._state(node, recognisers)
        return before != [self._facts.get(value) for value in node.outputs]

    def _state(self, node: ir.Node, recognisers: Sequence[Transfer]) -> None:
        """States the facts about a node's outputs, of which nothing is known."""
        if not (outputs := node.outputs):
            return
        inputs = node.inputs
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        count = len(inputs)
        present = inputs.index(None) if None in inputs else count
        for recogniser in recognisers:
            if present < recogniser.least or count > recogniser.most:
                continue
            try:
                stated = recogniser.function(self, node, *inputs)
            except MatchFailureError as near:
                self._reasons[outputs[0]] = reason_of(near.reason)
                continue
            except Exception as error:
                who, where = f"{recogniser.name} (a recogniser)", name_of(node)
                raise RuleError(who, where, f"{type(error).__name__}: {error}") from error
            if stated is None:
                continue
            for value, fact in stated.items() if isinstance(stated, Mapping) else ((outputs[0], stated),):
                known = self._facts.get(value)
                if known is None:
                    self._facts[value] = {type(fact): fact}
                    continue
                if _AGREED.get() and known.get(type(fact), fact) != fact and not recogniser.overrides:
                    other = f"states {fact} of '{value.name}', of which another states {known[type(fact)]}"
                    raise RuleError(f"{recogniser.name} (a recogniser)", name_of(node), other)
                known[type(fact)] = fact


class DeclineTracer(MatchingTracer):
    """Keeps the reason for which the last attempt of a rule ended, and where.

    ``failed`` says whether there was a rewrite, and its proof showed it wrong.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    def clear(self) -> None:
        """Forgets the last attempt."""
        self.reason = ""
        self.failed = False
        self.culprits: list[ir.Node | ir.Value] = []

    def decline(self, reason: str, culprits: Iterable[ir.Node | ir.Value]) -> None:
        """Keeps why and where."""
        self.reason = reason
        self.culprits = list(culprits)

    def fail(self, reason: str, node: ir.Node) -> None:
        """Keeps why a rewrite failed its proof: its rule is wrong here."""
        self.decline(reason, [node])
        self.failed = True

    def record(self, rule: str, phase: str, node: ir.Node) -> Decline:
        """Returns what a report says of an attempt that ended with a reason."""
        why = reason_of(self.reason)
        fault = self.culprits[0] if self.culprits else node
        return Decline(
            rule=rule,
            phase=phase,
            node=name_of(node),
            reason=str(why),
            culprit=(name_of(fault) if isinstance(fault, ir.Node) else fault.name) or name_of(node),
            remedy=why.remedy,
            expected=why.expected,
            failed=self.failed,
        )

    def log(self, rule: Any, container: Any, node: ir.Node, match_result: Any, status: MatchStatus) -> None:
        """Overrides the hook through which onnxscript tells how a match went."""
        del rule, container, node
        if status != MatchStatus.NO_MATCH and not match_result:
            self.decline(match_result.reason, match_result.failure_nodes_and_values)
