"""The only place that touches private names of onnxscript and onnx-ir.

onnxscript offers matching and replacing only together, in a driver that edits the model before the rewrite is accepted.
This engine needs the two apart, so it reads a rule's compiled pattern and replacement, and raises onnxscript's own
failure exception, which has no public name. A pattern of operators and variables alone, as most are, it matches itself,
with the same result in a third of the time.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import onnx_ir as ir
from onnxscript.rewriter import (
    MatchContext,
    MatchingTracer,
    MatchResult,
    MatchStatus,
    RewriteRule,
    RewriteRuleClassBase,
)
from onnxscript.rewriter._basics import MatchFailureError
from onnxscript.rewriter._context import TapeRewriterContext
from onnxscript.rewriter._matcher import SimplePatternMatcher
from onnxscript.rewriter._pattern_ir import NodeOutputPattern, Var

from rewriter.graph.tree import Part, Read, binds, only_these_read

__all__ = [
    "MatchFailureError",
    "OpKey",
    "compiled",
    "remove",
    "replaced_outputs",
    "replacement",
    "root_operator",
    "wrong_arity",
]

_MANY = 1 << 16
"""Inputs that no operator has but one that takes any number."""

OpKey = tuple[str, str]
"""Domain and operator type."""


def compiled(rule: RewriteRuleClassBase | RewriteRule) -> RewriteRule:
    """Returns the compiled form of a rule, which this module matches itself where its pattern is a tree."""
    if isinstance(rule, RewriteRule):
        built: Any = rule
    else:
        built = RewriteRule(rule.pattern, rule.rewrite, rule.check, name=rule.name, remove_nodes=rule.remove_nodes)
    matched_so = type(built) is RewriteRule and type(built._matcher) is SimplePatternMatcher
    return _Tree(built) if matched_so and _is_tree(built._target_pattern) else built


def _is_tree(pattern: Any) -> bool:
    """Whether a pattern is one root and what it reads, operators and variables, with no alternatives to try."""
    values = [value for node in pattern for value in (*node.inputs, *node.outputs) if value is not None]
    return (
        len(pattern.output_nodes) == 1
        and all(type(value) is NodeOutputPattern for value in pattern.outputs)
        and all(type(value) is NodeOutputPattern or (type(value) is Var and value.name) for value in values)
        and not any(part.check_method for part in (*pattern, *values, *pattern.inputs))
        and all(node.op_identifier() is not None for node in pattern)
    )


class _Tree(RewriteRule):
    """A rule whose pattern is a tree: each node is compared with the one part of the pattern that it can be."""

    def __init__(self, rule: Any) -> None:
        """Takes over a compiled rule."""
        super().__init__(
            rule._target_pattern,
            rule._replacement_pattern,
            rule._condition_function,
            name=rule.name,
            remove_nodes=rule.remove_nodes,
        )
        pattern = rule._target_pattern
        parts: dict[Any, Part] = {}
        self._root = _part(pattern.output_nodes[0], parts)
        self._made = [(parts[value.producer()], value.output_index) for value in pattern.outputs]
        self._variables = [variable.name for variable in pattern.inputs]
        asked = getattr(self._condition_function, "__func__", None)
        self._checks = asked is not RewriteRuleClassBase.check

    def match(
        self,
        model: ir.Model,
        graph_or_function: ir.Graph | ir.Function,
        node: ir.Node,
        *,
        verbose: int | None = None,
        check_nodes_are_removable: bool = True,
        tracer: MatchingTracer | None = None,
    ) -> MatchResult:
        """Overrides onnxscript's search."""
        found = MatchResult()
        known = found._current_match
        names = known._bindings
        bound: dict[Part, ir.Node] = {}
        if not binds(self._root, node, names, bound, found):
            return found.fail()
        outputs = [bound[part].outputs[index] for part, index in self._made]
        nodes = bound.values()
        if check_nodes_are_removable and not only_these_read(nodes, outputs):
            return found.fail()
        known._matched_nodes, known._outputs = list(nodes), outputs
        known._node_bindings.update((part.pattern, matched) for part, matched in bound.items())
        for variable in self._variables:
            names.setdefault(variable, None)
        if self._checks:
            self._check(MatchContext(model, graph_or_function, node, found), found)
            if not found and tracer is not None:
                tracer.log(self, graph_or_function, node, found, MatchStatus.CONDITION_FAILED)
        return found

    def _check(self, context: MatchContext, found: MatchResult) -> None:
        """Asks the rule's own condition; the match fails with what that says."""
        try:
            passed = self._condition_function(context, **found.bindings)
        except MatchFailureError as declined:
            passed = MatchResult().fail(declined.reason, list(declined.failure_sources))
        if not passed:
            said = passed if isinstance(passed, MatchResult) else MatchResult().fail("Condition function check failed")
            found.fail(said.reason, said.failure_nodes_and_values)


def _part(pattern: Any, parts: dict[Any, Part]) -> Part:
    """Reads a node of onnxscript's pattern, and those that it reads, once each."""
    if pattern not in parts:
        inputs: list[Read | None] = []
        for value in pattern.inputs:
            producer = None if value is None else value.producer()
            part = None if producer is None else _part(producer, parts)
            index = 0 if producer is None else value.output_index
            inputs.append(None if value is None else (value.name, value.can_match_none, part, index))
        domain, operator, *_ = pattern.op_identifier()
        attributes = pattern.matches if pattern.attributes or not pattern.allow_other_attributes else None
        outputs = tuple(value.name for value in pattern.outputs)
        parts[pattern] = Part(
            pattern, domain, operator, attributes, tuple(inputs), outputs, takes_more=pattern.allow_other_inputs
        )
    return parts[pattern]


def root_operator(rule: Any) -> OpKey | None:
    """Returns the operator that the pattern's root matches, or None where it may be any."""
    identifier = rule._target_pattern.output_nodes[0].op_identifier()
    return None if identifier is None else (identifier[0], identifier[1])


def wrong_arity(rule: Any) -> str:
    """Says which node of the pattern has more or fewer inputs than its operator takes: it would never match.

    Empty where none has, and of operators that ONNX does not define.
    """
    for node in rule._target_pattern:
        domain, operator, *_ = node.op_identifier() or ("", "")
        if domain not in ("", "ai.onnx") or not onnx.defs.has(operator):
            continue
        schema = onnx.defs.get_schema(operator)
        given, least, most = len(node.inputs), schema.min_input, schema.max_input
        if given > most or (given < least and not node.allow_other_inputs):
            takes = f"{least}" if least == most else f"{least} to {most}" if most < _MANY else f"at least {least}"
            hint = "" if given > most else "; _allow_other_inputs=True takes any others"
            return f"its pattern gives {operator} {given} input{'s' if given != 1 else ''}, and it takes {takes}{hint}"
    return ""


class _Tape(TapeRewriterContext):
    """onnxscript's builder without its optional steps, none of which a rewriter turns on."""

    def __getattr__(self, op_type: str) -> Any:
        """Overrides ``op.Relu(x)``."""
        return functools.partial(self.op, op_type)

    def op(
        self,
        op_type: str,
        /,
        *args: ir.Value | None,
        _domain: str = "",
        _version: int | None = None,
        _outputs: int | Sequence[str | ir.Value] = 1,
        _name: str | None = None,
        **kwargs: Any,
    ) -> ir.Value | Sequence[ir.Value]:
        """Overrides the making of a node."""
        given = ir.convenience.convert_attributes(kwargs) if kwargs else ()
        count, named = (_outputs, None) if isinstance(_outputs, int) else (None, self._adapt_outputs(_outputs, op_type))
        node = ir.Node(_domain, op_type, args, given, num_outputs=count, outputs=named, version=_version, name=_name)
        self._nodes.append(node)
        self._used_opsets.add((_domain, _version))
        return node.outputs[0] if len(node.outputs) == 1 else node.outputs

    def initializer(self, tensor: ir.TensorProtocol, name: str | None = None) -> ir.Value:
        """Overrides the making of a constant, whose every extent is a number."""
        name = name or tensor.name
        if name is None:
            raise ValueError("Name must be provided for initializer.")
        type_, shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=name, shape=shape, type=type_, const_value=tensor)
        self._initializers.append(value)
        return value


def replacement(rule: Any, match: MatchResult, *, may_be_none: bool) -> tuple[Any, TapeRewriterContext] | None:
    """Builds the replacement of a match: what the rule returns, and what it made.

    None where the rule declines; the match then carries the reason.

    Args:
        rule: the compiled rule.
        match: what it matched.
        may_be_none: whether the rule declines by returning None too, as onnxscript's own rules do.
    """
    tape = _Tape()
    try:
        new = rule._replacement_pattern._function(tape, **match.bindings)
    except MatchFailureError as declined:
        match.fail(declined.reason, list(declined.failure_sources))
        return None
    if isinstance(new, MatchResult):
        if new:
            raise TypeError("rewrite returned a match that did not fail; return the new values, or None")
        match.fail(new.reason, new.failure_nodes_and_values)
        return None
    if new is None or new is False:
        if not may_be_none:
            raise TypeError(f"rewrite returned {new}; return the new outputs, or raise NotApplicable or Declined")
        return None
    return new, tape


def remove(node: ir.Node) -> list[ir.Value]:
    """Takes a node out of its graph, and makes it read nothing, for good; returns what nothing reads any more.

    ``Graph.remove`` collects the graph's outputs each time, and ``replace_input_with`` makes the tuple of all inputs
    anew for each of them: three times as long, and quadratic where a node joins what hundreds of experts give.
    """
    assert node._graph is not None
    node._graph._nodes.remove(node)
    node._graph = None
    unread = []
    for index, value in enumerate(node._inputs):
        if value is not None:
            del value._uses[node, index]  # type: ignore[arg-type]  # a use is this tuple, with names
            if not value._uses:
                unread.append(value)
    node._inputs = ()
    return unread


def replaced_outputs(new: Any, match: MatchResult) -> Mapping[ir.Value, ir.Value]:
    """Returns old value -> new value; a rule returns that mapping itself where its root has any number of outputs."""
    if not isinstance(new, ir.Value) and isinstance(new, Mapping):
        outputs = dict(new)
    else:
        old = match.outputs
        values = [new] if isinstance(new, ir.Value) or not isinstance(new, Sequence) else new
        if len(values) != len(old):
            raise ValueError(f"the replacement has {len(values)} outputs where the pattern has {len(old)}")
        outputs = dict(zip(old, values, strict=True))
    for value in outputs.values():
        if not isinstance(value, ir.Value):
            raise TypeError(f"rewrite returned a {type(value).__name__} where it must return a value that op made")
    return outputs
