"""Facts about values: what recognisers state, computed forward, kept for the run and dropped where a commit touched."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import onnx_ir as ir
from onnxscript.rewriter import MatchingTracer, MatchStatus
from onnxscript.rewriter.pattern import Pattern, PatternBase

from rewriter.errors import RuleError
from rewriter.facts.family import Stated, Transfer
from rewriter.graph._onnxscript import MatchFailureError, OpKey, binder, root_operator
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


def _overrides(recogniser: object) -> bool:
    return isinstance(recogniser, Transfer) and recogniser.overrides


class Recogniser(PatternBase):
    """An onnxscript pattern that states a fact about the values its root produces, and changes nothing.

    A subclass writes ``pattern`` and ``recognise``.
    """

    def recognise(self, facts: Facts, *args: Any, **bindings: Any) -> object | Mapping[ir.Value, object] | None:
        """Returns the fact about the root's first output, a fact per output, or None where there is nothing to say.

        Raises:
            Declined: the value is almost what the recogniser is about; the reason is kept and can be asked for.
        """
        raise NotImplementedError


class Facts:
    """Every fact about the values of one model, as a set of recognisers states them.

    A value that no caller can change (``tensors.constant``) has the fact ``View`` without any recogniser.
    """

    def __init__(
        self, model: ir.Model, recognisers: Iterable[Recogniser | Transfer], under: Facts | None = None
    ) -> None:
        """Prepares facts; ``compute`` states them.

        Args:
            model: the model.
            recognisers: what states them.
            under: facts that these follow from, and that follow from none of these: constants, kept for a whole run.
        """
        self._model = model
        self._under = under
        self._facts: dict[ir.Value, dict[type, object]] = {}
        self._derived: dict[ir.Value, dict[type, object]] = {}
        self._reasons: dict[ir.Value, Reason] = {}
        self._by_operator: dict[OpKey, list[tuple[Recogniser | Transfer, Callable[[ir.Node], Stated]]]] = {}
        for recogniser in recognisers:
            key, state = self._bound(recogniser)
            self._by_operator.setdefault(key, []).append((recogniser, state))

    def _bound(self, recogniser: Recogniser | Transfer) -> tuple[OpKey, Callable[[ir.Node], Stated]]:
        """The operator that a recogniser is about, and what it states of such a node."""
        if isinstance(recogniser, Transfer):

            def called(node: ir.Node) -> Stated:
                inputs = recogniser.inputs_of(node)
                return None if inputs is None else recogniser.function(self, node, *inputs)

            return (recogniser.domain, recogniser.op_type), called
        pattern = Pattern(recogniser.pattern, name=recogniser.name)
        key, bind = root_operator(pattern), binder(pattern)
        if key is None:
            raise ValueError(f"recogniser {recogniser.name}: the root of its pattern must name an operator")

        def matched(node: ir.Node) -> Stated:
            bindings = bind(self._model, node)
            return None if bindings is None else recogniser.recognise(self, **bindings)

        return key, matched

    @property
    def opset(self) -> int:
        """Version of the standard operators that the model imports."""
        return self._model.graph.opset_imports.get("", 1)

    def get(self, value: ir.Value | None, kind: type[F]) -> F | None:
        """Returns what is known of ``value`` as a ``kind``, or None."""
        if value is None:
            return None
        known = self._facts.get(value)
        if known is None or kind not in known:
            if self._under is not None:
                return self._under.get(value, kind)
            if kind is not View:
                return None
            producer = value.producer()
            if producer is not None and producer.op_type != "Constant":
                return None
            view = constant(value)
            known = self._facts.setdefault(value, {})
            known[View] = view
        fact = known[kind]
        return fact if isinstance(fact, kind) else None

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
        """Returns what ``derived`` has computed, or None where it has not been asked."""
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

    def compute(self) -> None:
        """States the facts of every node of the model, in topological order."""
        if self._by_operator:
            for node in all_nodes(self._model):
                if (node.domain, node.op_type) in self._by_operator:
                    self._visit(node)

    def update(
        self, removed: Iterable[ir.Node], added: Sequence[ir.Node], rewired: Iterable[ir.Value]
    ) -> list[ir.Value]:
        """Drops what a commit removed and states anew what it added and whatever follows from it.

        Returns:
            The values about which something else is known now.
        """
        removed, rewired = tuple(removed), tuple(rewired)
        changed = [] if self._under is None else self._under.update(removed, added, rewired)
        if not self._by_operator:
            return changed
        for node in removed:
            for value in node.outputs:
                self._forget(value)
        queue = deque([*added, *(use.node for value in (*rewired, *changed) for use in value.uses())])
        while queue:
            node = queue.popleft()
            if (node.domain, node.op_type) in self._by_operator and self._visit(node):
                changed.extend(node.outputs)
                queue.extend(use.node for value in node.outputs for use in value.uses())
        return changed

    def _forget(self, value: ir.Value) -> None:
        for known in (self._facts, self._derived, self._reasons):
            known.pop(value, None)

    def _visit(self, node: ir.Node) -> bool:
        """Recomputes the facts about the node's outputs; True where they changed."""
        before = [self._facts.get(value) for value in node.outputs]
        for value in node.outputs:
            self._forget(value)
        for recogniser, state in self._by_operator[(node.domain, node.op_type)]:
            try:
                stated = state(node)
            except MatchFailureError as near:
                self._reasons[node.outputs[0]] = reason_of(near.reason)
                continue
            except Exception as error:
                who, where = f"{recogniser.name} (a recogniser)", name_of(node)
                raise RuleError(who, where, f"{type(error).__name__}: {error}") from error
            if stated is None:
                continue
            by_value = stated if isinstance(stated, Mapping) else {node.outputs[0]: stated}
            for value, fact in by_value.items():
                known = self._facts.setdefault(value, {})
                if _AGREED.get() and known.get(type(fact), fact) != fact and not _overrides(recogniser):
                    other = f"states {fact} of '{value.name}', of which another states {known[type(fact)]}"
                    raise RuleError(f"{recogniser.name} (a recogniser)", name_of(node), other)
                known[type(fact)] = fact
        return before != [self._facts.get(value) for value in node.outputs]


class DeclineTracer(MatchingTracer):
    """Keeps the reason for which the last attempt of a rule ended, and where.

    ``mismatch`` says why no pattern matched; ``failed`` whether there was a rewrite, and its proof showed it wrong.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    def clear(self) -> None:
        """Forgets the last attempt."""
        self.mismatch = ""
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
        if status == MatchStatus.NO_MATCH:
            self.mismatch = match_result.reason
        elif not match_result:
            self.decline(match_result.reason, match_result.failure_nodes_and_values)
