"""Toy rule packages, found through faked entry points so that nothing needs to be installed."""

from __future__ import annotations

import itertools
import sys
import textwrap
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest

from rewriter.ruleset import discover

IDENTITY = '''
"""A rule that removes an Identity.

Matched:      Identity(x)
Replacement:  x
Declines when: never,
    ever
Source:       a test
"""

from typing import Literal

from onnxscript.rewriter.pattern import RewriteRuleClassBase


class DropIdentity(RewriteRuleClassBase):
    def pattern(self, op, x):
        return op.Identity(x)

    def rewrite(self, op, x):
        return x


def rule(
    *,
    accuracy_level: int = 0,
    mode: Literal["fast", "exact"] = "exact",
    scale: float | None = None,
    names: tuple[str, ...] = (),
    axes: list[int] = [],
    flag: bool = False,
):
    """Makes the rule.

    Args:
        accuracy_level: what it reaches for
        mode (str): fast or exact
    """
    if accuracy_level < 0:
        raise ValueError("accuracy_level is negative")
    return [DropIdentity(), DropIdentity.rule()]
'''

PLAIN = '''
"""A rule without options."""

from onnxscript.rewriter.pattern import RewriteRuleClassBase


class DropCast(RewriteRuleClassBase):
    def pattern(self, op, x):
        return op.Cast(x)

    def rewrite(self, op, x):
        return x


def rule():
    return DropCast()
'''

BASE = """\
description: A base.
phases:
  - name: first
    rules: [drop-identity]
quantization:
  default: {bits: 8, block_size: 64}
  exclude: [{role: router}]
"""

_numbers = itertools.count()


@pytest.fixture
def offer(tmp_path, monkeypatch):
    """Returns a function that installs a package of the given files and returns its name."""
    entry_points = []
    fake = SimpleNamespace(entry_points=lambda *, group: [e for e in entry_points if e.group == group])
    monkeypatch.setattr(discover, "metadata", fake)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    before = set(sys.modules)

    def install(files, name=None):
        name = name or f"toy_rules_{next(_numbers)}"
        folder = tmp_path / "site" / name
        for path, text in {"__init__.py": "", **files}.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text.lstrip("\n"))
        entry_points.append(EntryPoint(name, name, discover.GROUP))
        return name

    yield install
    for module in set(sys.modules) - before:
        if module.startswith("toy_rules_"):
            del sys.modules[module]


@pytest.fixture
def texts():
    """The source of the toy rules."""
    return SimpleNamespace(identity=IDENTITY, plain=PLAIN)


@pytest.fixture
def toy(offer):
    """Installs one package with two rules and one rule set, and returns its name."""
    return offer(
        {
            "drop_identity.py": IDENTITY,
            "drop_cast.py": PLAIN,
            "_guards.py": "raise AssertionError('not a rule')",
            "recognise/__init__.py": "raise AssertionError('not searched')",
            "sets/base.yaml": BASE,
            "sets/README.md": "not a set",
        }
    )


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Returns a function that writes a file into the working directory and returns its name."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def save(text, name="set.yaml"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return name

    return save
