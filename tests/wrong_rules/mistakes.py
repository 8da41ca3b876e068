"""Mistakes in the source of a rule, and a way to make one for the length of a test."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any
from unittest import mock

import onnx_ir as ir
from hypothesis.strategies import SearchStrategy

from rewriter.parity import apart

ROOT = Path(__file__).parents[2]
_OWN_SCOPE = inspect.CO_NEWLOCALS  # what a function has and the body of a class has not


@dataclass(frozen=True)
class Mistake:
    """A wrong version of a rule.

    Attributes:
        rule: the rule's id.
        name: what is wrong, in a few words.
        path: the file in which the mistake is made.
        changes: texts that stand exactly once in the file, each with what stands there instead.
        models: returns what draws models of which some show the mistake; asked before it is made.
        given: what the check is given: the id, or a rule set with the options and the plan that show the mistake.
        guard: whether a guard is gone. The models are then ones on which the rule fires rightly, and ``near_misses``
            has to find the fact that was guarded against; else ``check_rule`` holds the rule on the models themselves.
    """

    rule: str
    name: str
    path: str
    changes: Sequence[tuple[str, str]] = field(repr=False)
    models: Callable[[], SearchStrategy[ir.Model]] = field(repr=False)
    given: Any = field(default=None, repr=False)
    guard: bool = False

    @property
    def source(self) -> str:
        """The file as it is."""
        return (ROOT / self.path).read_text(encoding="utf-8")


def codes(path: str) -> dict[str, CodeType]:
    """The code that every function and method of a file runs now, by qualified name."""
    names = _codes(path, (ROOT / path).read_text(encoding="utf-8"))
    return {name: function.__code__ for name, function in _functions(path, names)}


@contextlib.contextmanager
def made(mistake: Mistake) -> Iterator[int]:
    """Makes the mistake while the context lasts; gives the number of functions that are other ones now.

    The functions stay the objects that they are, so that every module which has imported one has the wrong one; only
    their code is exchanged, and put back.
    """
    right, wrong = (_codes(mistake.path, text) for text in (mistake.source, _wrong(mistake)))
    changed = [
        (function, wrong[name]) for name, function in _functions(mistake.path, right) if wrong[name] != right[name]
    ]
    kept = [(function, function.__code__) for function, _ in changed]
    try:
        for function, code in changed:
            function.__code__ = code
        with mock.patch.multiple(apart, start=lambda: None, _WORKERS=[]):  # models run where the mistake is
            yield len(changed)
    finally:
        for function, code in kept:
            function.__code__ = code


def _wrong(mistake: Mistake) -> str:
    """The source with the mistake; no line moves, so that no function changes but those that are wrong."""
    text = mistake.source
    for right, wrong in mistake.changes:
        text = text.replace(right, wrong + "\n" * (right.count("\n") - wrong.count("\n")))
    return text


def _codes(path: str, text: str) -> dict[str, CodeType]:
    """The code of every function and method in a source, by qualified name."""
    found: dict[str, CodeType] = {}
    pending = [compile(text, str(ROOT / path), "exec", dont_inherit=True)]
    while pending:
        for code in pending.pop().co_consts:
            if isinstance(code, CodeType):
                if code.co_flags & _OWN_SCOPE:
                    found[code.co_qualname] = code
                else:
                    pending.append(code)
    return found


def _functions(path: str, codes: dict[str, CodeType]) -> Iterator[tuple[str, FunctionType]]:
    """The live functions that have these codes."""
    dotted = path.removesuffix(".py").replace("/", ".")
    module = importlib.import_module(f"rewriter.{dotted}" if dotted.startswith("rules.") else dotted)
    for name in codes:
        if "<" not in name:
            yield name, functools.reduce(_member, name.split("."), module)  # type: ignore[misc]


def _member(owner: Any, name: str) -> Any:
    """What a module or class holds under a name, without what wraps it."""
    found = vars(owner)[name]
    for wrapper in ("fget", "func", "__func__", "__wrapped__"):
        found = getattr(found, wrapper, None) or found
    return found
