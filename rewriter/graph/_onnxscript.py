"""The only place that touches onnxscript's private names.

onnxscript offers matching and replacing only together, in a driver that edits the model before the rewrite is accepted.
This engine needs the two apart, so it reads a rule's compiled pattern and replacement, and raises onnxscript's own
failure exception, which has no public name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import onnx_ir as ir
from onnxscript.rewriter import MatchingTracer, MatchResult, RewriteRule, RewriteRuleClassBase
from onnxscript.rewriter._basics import MatchFailureError
from onnxscript.rewriter._pattern_ir import Var
from onnxscript.rewriter._rewrite_rule import ReplacementSubgraph

__all__ = [
    "MatchFailureError",
    "OpKey",
    "compiled",
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
    """Returns the compiled form of a rule written as a class; a compiled one as it is."""
    if isinstance(rule, RewriteRule):
        return rule
    given = rule.pattern, rule.rewrite, rule.check
    built = RewriteRule(*given, name=rule.name, remove_nodes=rule.remove_nodes)
    if type(rule).check is RewriteRuleClassBase.check and _asks_only_where(built):
        return _OneNode(*given, name=rule.name, remove_nodes=rule.remove_nodes)
    return built


def _asks_only_where(rule: Any) -> bool:
    """Whether a pattern is one node with a first input, whatever else there is."""
    pattern = rule._target_pattern
    if len(pattern) != 1 or len(pattern.inputs) != 1:
        return False
    (node,) = pattern
    return (
        type(pattern.inputs[0]) is Var
        and node.inputs == pattern.inputs
        and len(node.outputs) == 1
        and not any(value.check_method or value.name is None for value in (*pattern.inputs, *node.outputs))
        and not (node.check_method or node.attributes or pattern.inputs[0].can_match_none)
        and node.allow_other_inputs
        and node.allow_other_attributes
        and node.op_identifier() is not None
    )


class _OneNode(RewriteRule):
    """A rule that begins at one operator and asks all else of the node, at which there is nothing to search for."""

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
        """Overrides onnxscript's matcher, which takes as long as all that such a rule asks."""
        pattern: Any = self._target_pattern.output_node
        found = MatchResult()
        others = node.outputs[1:] if check_nodes_are_removable else ()
        if (
            node.op_identifier()[:2] != pattern.op_identifier()[:2]
            or not (node.inputs and node.outputs)
            or node.inputs[0] is None
            or any(value.is_graph_output() or value.uses() for value in others)
        ):
            return found.fail()
        found.bind_node(pattern, node)
        found.bind(pattern.inputs[0].name, node.inputs[0])
        found.bind(pattern.outputs[0].name, node.outputs[0])
        found.outputs.append(node.outputs[0])
        return found


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


def replacement(rule: RewriteRule, match: MatchResult) -> ReplacementSubgraph | None:
    """Builds the replacement of a match; None where the rule declines (the match then carries the reason)."""
    return rule._replacement_pattern.get_replacement(match)


def replaced_outputs(built: ReplacementSubgraph) -> Mapping[ir.Value, ir.Value]:
    """Returns old value -> new value; a rule returns that mapping itself where its root has any number of outputs."""
    new: Sequence[Any] = built.new_outputs
    mapped = len(new) == 1 and isinstance(new[0], Mapping)
    if not mapped and len(new) != len(built.match.outputs):
        raise ValueError(f"the replacement has {len(new)} outputs where the pattern has {len(built.match.outputs)}")
    outputs = dict(new[0]) if mapped else dict(zip(built.match.outputs, new, strict=True))
    for value in outputs.values():
        if not isinstance(value, ir.Value):
            raise TypeError(f"rewrite returned a {type(value).__name__} where it must return a value that op made")
    return outputs
