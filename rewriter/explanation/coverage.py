"""Float experts and embeddings that stay so because no rule of the set begins at the operator that reads them."""

from __future__ import annotations

from rewriter.api import DEFAULT_RULES
from rewriter.graph._onnxscript import OpKey
from rewriter.operators.moe import MOE
from rewriter.operators.operator import DOMAIN
from rewriter.report import Report
from rewriter.ruleset import RuleSet
from rewriter.text import nbytes

EXPERTS: OpKey = (DOMAIN, MOE.name)
LOOKUP: OpKey = ("", "Gather")


def unread_experts(rule_set: RuleSet, report: Report) -> str:
    """Returns a line where MoE nodes keep float experts that no rule of the set reads; else nothing."""
    left = sum(weight.nbytes for weight in report.left if EXPERTS[1] in weight.readers and not weight.rule)
    if not left or not _lacks(rule_set, EXPERTS):
        return ""
    return _line(f"MoE nodes hold {nbytes(left)} of float experts", rule_set)


def unread_here(rule_set: RuleSet, *, experts: bool, embedding: bool) -> str:
    """Returns such a line for a MoE node, or for an embedding; else nothing."""
    if experts and _lacks(rule_set, EXPERTS):
        return _line("A MoE node holds float experts", rule_set)
    if embedding and _lacks(rule_set, LOOKUP):
        return _line("It is an embedding", rule_set)
    return ""


def _lacks(rule_set: RuleSet, operator: OpKey) -> bool:
    """Whether a rule set quantizes, and none of its rules begins at this operator to do so."""
    return rule_set.quantizes and not rule_set.reads(operator)


def _line(what: str, rule_set: RuleSet) -> str:
    return f"{what}, which no rule of {rule_set.name} reads; rule set {DEFAULT_RULES} does."
