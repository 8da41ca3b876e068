"""Markdown, and what this project ships."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from rewriter.ruleset import load
from rewriter.ruleset.catalogue import RuleInfo, catalogue
from rewriter.ruleset.load import rule_sets
from rewriter.ruleset.model import RuleSet

OWN = "rewriter.rules"
"""The package whose rules and sets are documented; others that are installed are not."""


def table(head: Sequence[str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def code(text: object) -> str:
    """Returns text as code, in one line."""
    return f"`{text}`"


def prose(text: str) -> str:
    return text.replace("``", "`").replace("<", "&lt;") if "``" not in text else text.replace("``", "`")


def as_yaml(value: object) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def own_rules() -> list[RuleInfo]:
    """Returns the rules that this project ships."""
    return [info for info in catalogue() if info.package == OWN]


def own_sets() -> dict[str, RuleSet]:
    """Returns the rule sets that this project ships, each with what it extends."""
    return {name: load(name) for name, info in rule_sets().items() if info.package == OWN}


def written(name: str) -> dict[str, Any]:
    """What the file of a shipped set holds."""
    document: dict[str, Any] = yaml.safe_load(Path(rule_sets()[name].path).read_text(encoding="utf-8"))
    return document
