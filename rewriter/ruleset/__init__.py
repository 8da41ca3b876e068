"""Rule sets: phases of rules with options, a quantization plan and parity settings, from strict YAML."""

from rewriter.ruleset.catalogue import OptionInfo, RuleInfo, catalogue
from rewriter.ruleset.load import RuleLike, RuleSetInfo, RuleSetLike, load, parse_override, rule_sets
from rewriter.ruleset.model import BoundRule, ParitySettings, Phase, Rule, RuleSet
from rewriter.ruleset.schema import json_schema, schema_text
from rewriter.ruleset.used import used

__all__ = [
    "BoundRule",
    "OptionInfo",
    "ParitySettings",
    "Phase",
    "Rule",
    "RuleInfo",
    "RuleLike",
    "RuleSet",
    "RuleSetInfo",
    "RuleSetLike",
    "catalogue",
    "json_schema",
    "load",
    "parse_override",
    "rule_sets",
    "schema_text",
    "used",
]
