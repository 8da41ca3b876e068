"""Rule sets from their names, files, parsed mappings or rules in Python."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxscript.rewriter.pattern import RewriteRuleClassBase

from rewriter.errors import RuleSetError
from rewriter.ruleset.discover import reason, set_offers, skip
from rewriter.ruleset.document import read
from rewriter.ruleset.model import BoundRule, Phase, Rule, RuleSet
from rewriter.ruleset.reader import Reader, shipped
from rewriter.ruleset.source import Source, parse_yaml

RuleLike = str | Rule | type[RewriteRuleClassBase]
RuleSetLike = str | os.PathLike[str] | Mapping[str, Any] | RuleSet | Sequence[RuleLike]
"""A shipped name, a file, a parsed mapping, a rule set, or rules (ids, classes or instances)."""

_INLINE = "inline"
_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z0-9]+|[A-Z0-9]+")


@dataclass(frozen=True)
class RuleSetInfo:
    """A shipped rule set: its id, package, file and description."""

    name: str
    package: str
    path: str
    description: str


def rule_sets() -> dict[str, RuleSetInfo]:
    """Returns the shipped rule sets by id; with a warning, without those that cannot be read."""
    found = {}
    for name, offer in sorted(set_offers().items()):
        try:
            found[name] = RuleSetInfo(name, offer.package, str(offer.path), read(shipped(offer)).description)
        except RuleSetError as error:
            skip(f"a rule set of package '{offer.package}'", str(error))
    return found


def load(source: RuleSetLike, *, overrides: Mapping[str, Any] | None = None) -> RuleSet:
    """Reads a rule set, with everything it extends, and binds its rules.

    Args:
        source: a shipped set's name, the path of a YAML file, a parsed mapping, a rule set, or a list of rules.
        overrides: values by dotted key (``quantization.default.bits``), validated as a rule set that extends this one.

    Raises:
        RuleSetError: the rule set is wrong; one line with the place and the nearest valid name.
    """
    reader = Reader()
    if isinstance(source, RuleSet):
        ruleset = source
    elif isinstance(source, Mapping):
        ruleset = reader.build(_INLINE, Source("rule set", _plain(source), Path()))
    elif isinstance(source, str | os.PathLike):
        name = Path(source).name.removesuffix(".yaml").removesuffix(".yml")
        ruleset = reader.build(name, reader.find(source, Path()))
    elif isinstance(source, Sequence):
        rules = tuple(_bound(reader, rule, index) for index, rule in enumerate(source))
        ruleset = RuleSet(_INLINE, phases=(Phase("rules", rules),) if rules else ())
    else:
        raise RuleSetError(f"a rule set is a name, a file, a mapping or a list of rules, not {type(source).__name__}")
    if overrides:
        layer = Source("override", _nested(overrides), Path())
        document = read(layer)
        if document.extends:
            raise layer.error(("extends",), "a rule set's base cannot be overridden: name another rule set instead")
        if "phases" in overrides and not document.phases:
            raise layer.error(("phases",), "changes nothing: a phase is replaced by one of the same name")
        ruleset = reader.extend(ruleset, layer, document)
    if not ruleset.phases:
        raise RuleSetError(f"rule set '{ruleset.name}' has no phases, so there is nothing to run")
    return ruleset


def parse_override(text: str) -> tuple[str, object]:
    """Parses ``key.subkey=value``, as the command line takes it; the value is YAML.

    Raises:
        RuleSetError: no ``=``, or the value is not YAML.
    """
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise RuleSetError(f"override '{text}' is not of the form key=value, as in quantization.default.bits=8")
    return key, parse_yaml(value, f"override {key}").data if value.strip() else None


def _bound(reader: Reader, rule: object, index: int) -> BoundRule:
    source = Source("rules", None, None)
    if isinstance(rule, str):
        return reader.bind(rule, {}, source, (index,))
    if isinstance(rule, type) and issubclass(rule, RewriteRuleClassBase):
        try:
            rule = rule()
        except Exception as error:
            raise source.error((index,), f"cannot make the rule: {reason(error)}") from error
    if not isinstance(rule, Rule):
        kind = rule if isinstance(rule, type) else type(rule)
        raise source.error((index,), f"a rule is an onnxscript rule or a rule's id, not {kind.__name__}")
    return BoundRule(_kebab(rule.name or type(rule).__name__), {}, (rule,))


def _kebab(name: str) -> str:
    return "-".join(word.lower() for word in _WORD.findall(name))


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def _nested(overrides: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(overrides, Mapping) or not all(isinstance(key, str) for key in overrides):
        raise RuleSetError('overrides are values by dotted key, as {"quantization.default.bits": 8}')
    root: dict[str, Any] = {}
    for key, value in overrides.items():
        *parents, last = key.split(".")
        node: Any = root
        for parent in parents:
            node = node.setdefault(parent, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last in node:
            raise RuleSetError(f"override {key}: given twice, or inside a value that is given too")
        node[last] = _plain(value)
    return root
