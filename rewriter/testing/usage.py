"""What the tests of rules are given, held to what it may be: each misuse is one line that says what to write."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence

import onnx
import onnx_ir as ir
from hypothesis.strategies import SearchStrategy
from onnxscript.rewriter import RewriteRule, RewriteRuleClassBase

from rewriter.errors import UsageError
from rewriter.ruleset import load
from rewriter.ruleset.discover import rule_offers, set_offers
from rewriter.ruleset.load import RuleLike, RuleSetLike

_GUTTER = re.compile(r"^[ \t]*E(?=$|[ \t]{2,}[^ \t=])", re.MULTILINE)
"""What pytest prints before each line of a message."""

RuleUnderTest = RuleLike | RuleSetLike
"""A rule (an id, a class or an instance), or a rule set in any form but its name."""


def name_of(rule: object) -> str:
    """Returns the name of a rule, as messages show it."""
    if isinstance(rule, str):
        return rule
    if isinstance(rule, Mapping):
        phases = [phase for phase in rule.get("phases", ()) if isinstance(phase, Mapping)]
        listed = [one for phase in phases for one in phase.get("rules", ())]
        plain = [next(iter(one), "") if isinstance(one, Mapping) else one for one in listed]
        return ", ".join(dict.fromkeys(map(str, plain))) or "a rule set"
    if isinstance(rule, Sequence):
        return ", ".join(dict.fromkeys(map(name_of, rule)))
    name = getattr(rule, "name", None)
    return str(name or (rule.__name__ if isinstance(rule, type) else type(rule).__name__))


def as_rules(rule: RuleUnderTest) -> RuleSetLike:
    """Returns what :func:`rewriter.apply` takes for a rule or a rule set."""
    return [rule] if isinstance(rule, str | RewriteRule | RewriteRuleClassBase | type) else rule


def require_rule(rule: RuleUnderTest) -> None:
    """Refuses what is no rule.

    Raises:
        UsageError: it is something that makes, holds or follows a rule.
        RuleSetError: no rule has this id, or a rule or rule set is wrong.
    """
    if inspect.isroutine(rule):
        raise UsageError(f"'{rule.__name__}' is a function and no rule: write {rule.__name__}()")
    if inspect.ismodule(rule):
        short = rule.__name__.rpartition(".")[2]
        raise UsageError(f"'{rule.__name__}' is a module and no rule: write {short}.rule()")
    if isinstance(rule, SearchStrategy):
        raise UsageError("a strategy stands where the rule should be: write the rule first, then the strategy")
    if isinstance(rule, str) and rule in set_offers() and rule not in rule_offers():
        raise UsageError(f"'{rule}' is a rule set and no rule: write rewriter.load('{rule}')")
    load(as_rules(rule))


def require_models(models: object, what: str = "models") -> None:
    """Refuses what draws no models; None stands for a default and is right.

    Raises:
        UsageError: it is a function that makes a strategy, or a model, or several.
    """
    if models is None or isinstance(models, SearchStrategy):
        return
    if inspect.isroutine(models):
        raise UsageError(f"{what} must be a strategy, and '{models.__name__}' is a function: write {models.__name__}()")
    hint = ": write st.just(model)" if isinstance(models, ir.Model) else ""
    hint = ": write st.sampled_from(models)" if isinstance(models, list | tuple) else hint
    raise UsageError(f"{what} must be a strategy that draws models, not {type(models).__name__}{hint}")


def as_model(model: object) -> ir.Model:
    """Returns a model that is given as itself or as ONNX text.

    Raises:
        UsageError: it is neither.
    """
    if isinstance(model, ir.Model):
        return model
    if isinstance(model, str):
        try:
            return ir.from_onnx_text(_GUTTER.sub("", model))
        except onnx.parser.ParseError as error:
            reason = error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else error
            raise UsageError(f"this is no model as ONNX text: {reason} (of a file: ir.load(path))") from None
    hint = ": write ir.from_proto(model)" if isinstance(model, onnx.ModelProto) else ""
    raise UsageError(f"a model is an onnx_ir.Model or its ONNX text, not {type(model).__name__}{hint}")
