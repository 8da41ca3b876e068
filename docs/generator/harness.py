"""The page of the tests of rules: strategies, promises and changed facts, as their docstrings say."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from typing import Any

from generator.markdown import code, prose, table
from rewriter.testing import promises
from rewriter.testing.change.mutations import MUTATIONS
from rewriter.testing.plugin import PROFILES
from rewriter.testing.strategies import STRATEGIES

_ARGUMENT = re.compile(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)
_NAMED = re.compile(r",? of ``[A-Z_]+``")


def strategies() -> str:
    """Returns each strategy with what it draws and its arguments."""
    return "\n".join(_strategy(strategy) for strategy in STRATEGIES)


def promised() -> str:
    """Returns what is held of a result beside its form, a promise a line."""
    names = sorted(module.name for module in pkgutil.iter_modules(promises.__path__))
    modules = [importlib.import_module(f"{promises.__name__}.{name}") for name in names]
    return "".join(f"- {prose(_title(module))}\n" for module in modules)


def facts() -> str:
    """Returns what ``near_misses`` changes, a fact a line."""
    rows = [[code(mutation.__name__), prose(_title(mutation))] for mutation in MUTATIONS]
    return table(("fact", "the changed model"), rows)


def profiles() -> str:
    """Returns the profiles of the plugin."""
    rows = [[code(name), str(size), "the same" if same else "others"] for name, (size, same) in PROFILES.items()]
    return table(("profile", "models of each test", "each time"), rows)


def _strategy(strategy: Callable[..., Any]) -> str:
    text = inspect.getdoc(inspect.unwrap(strategy)) or ""  # which names the choices that the table has as defaults
    drawn = prose(" ".join(text.partition("\nArgs:")[0].split()))
    meanings = {name: _NAMED.sub("", " ".join(meaning.split())) for name, meaning in _ARGUMENT.findall(text)}
    rows = []
    for name, parameter in inspect.signature(strategy).parameters.items():
        if name not in meanings:
            raise SystemExit(f"argument '{name}' of {strategy.__name__} has no line in its Args")
        rows.append([code(name), _default(parameter.default), prose(meanings[name])])
    return f"### {strategy.__name__}\n\n{drawn}\n\n{table(('argument', 'default', 'meaning'), rows)}"


def _default(value: object) -> str:
    return ", ".join(map(_literal, value)) if isinstance(value, tuple) else _literal(value)


def _literal(value: object) -> str:
    return code(f'"{value}"' if isinstance(value, str) else value)


def _title(thing: object) -> str:
    return (inspect.getdoc(thing) or "").partition("\n\n")[0].replace("\n", " ")
