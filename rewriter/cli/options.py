"""What the commands share: argument types, sizes, completion, and settings that become a rule set."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rewriter.errors import RewriterError, RuleSetError

if TYPE_CHECKING:
    from rewriter.ruleset import RuleSet

_FEWEST = 1000
"""Bytes below which nobody means bytes."""

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def size(text: str) -> int:
    """Reads a number of bytes: ``512MiB``, ``2GB``, ``1.5g``, ``1048576``."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", text.strip().lower())
    count = float(found[1]) * _UNITS[found[2] or ""] if found else 0
    if count < 1:
        raise typer.BadParameter(f"'{text}' is not a size, as 512MiB, 2GB or 1048576")
    if count < _FEWEST:
        raise typer.BadParameter(f"'{text}' is {count:g} bytes; did you mean {count:g}MB?")
    return int(count)


def finite(value: float | None) -> float | None:
    """Refuses NaN and infinity, to which every figure compares alike."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"'{value}' is no finite number")
    return value


def complete_rule_sets(incomplete: str) -> list[str]:
    from rewriter.ruleset.discover import set_offers

    return _starting(incomplete, set_offers())


def complete_rules(incomplete: str) -> list[str]:
    from rewriter.ruleset.discover import rule_offers

    return _starting(incomplete, rule_offers())


def complete_targets(incomplete: str) -> list[str]:
    """Completes targets: a provider, its architectures, and after ``@`` the versions of which something is known."""
    from rewriter.target.target import PROVIDERS

    provider, at, _ = incomplete.partition("@")
    if at:
        return _starting(incomplete, [f"{provider}@1.{minor}" for minor in range(23, 33)])
    return _starting(incomplete, ["auto", *PROVIDERS, "cuda:sm80", "cuda:sm90"])


def complete_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """Completes roles, and the names of weights and nodes of the model that the command line names."""
    from rewriter.explanation.focus import names_of
    from rewriter.io import load

    try:
        return _starting(incomplete, names_of(load(ctx.params["model"])))[:200]
    except (RewriterError, KeyError, TypeError):
        return []


def complete_rules_and_sets(incomplete: str) -> list[str]:
    return [*complete_rules(incomplete), *complete_rule_sets(incomplete)]


def _starting(incomplete: str, names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.startswith(incomplete))


def given(metavar: str, text: str, *names: str, **more: Any) -> Any:
    """Returns an option that has no default to show: what it takes, what it does, and its names where not the usual."""
    return typer.Option(*names, metavar=metavar, help=text, show_default=False, **more)


Model = Annotated[
    Path, typer.Argument(metavar="MODEL", show_default=False, help="An .onnx file, or a directory that holds one.")
]
Rules = Annotated[
    str,
    typer.Option(
        "--rules",
        "-r",
        metavar="NAME|FILE",
        help="A shipped rule set, or a YAML file.",
        autocompletion=complete_rule_sets,
    ),
]
Settings = Annotated[
    list[str],
    given("KEY=VALUE", "Change a value of the rule set, as quantization.default.bits=8. May be repeated.", "--set"),
]
TargetName = Annotated[
    str | None,
    given(
        "TARGET",
        "Runtime to rewrite for, as cpu, cuda:sm90 or webgpu@1.30; by default the rule set's.",
        "--target",
        autocompletion=complete_targets,
    ),
]
Level = Literal["class", "all", "none"]
"""Which rewrites are proved by running them."""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for a program.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print failures only.")]

DEFAULT_RULES = "moe-int4"
"""As ``rewriter.api`` has it, whose import would take --help a second; a test holds the two together."""


def progress(phase: str, count: int) -> str:
    return f"phase {phase}: matching and rewriting, {count:,} rewrites so far"


def rule_set(rules: str, settings: Sequence[str], parity: Level | None = None) -> RuleSet:
    """Reads a rule set with what the command line changes in it.

    Raises:
        RuleSetError: it, or a change, is wrong.
    """
    from rewriter.ruleset import load, parse_override

    overrides: dict[str, object] = {}
    for key, value in map(parse_override, settings):
        if key in overrides:
            raise RuleSetError(f"--set {key} is given twice")
        overrides[key] = value
    if parity is not None:
        overrides["parity.local"] = parity
    return load(rules, overrides=overrides)
