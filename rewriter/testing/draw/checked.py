"""Arguments of strategies, checked where they are given and not where a model is drawn."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, ParamSpec

import onnx_ir as ir
from hypothesis.errors import InvalidArgument
from hypothesis.strategies import SearchStrategy

from rewriter.errors import nearest

P = ParamSpec("P")
Models = Callable[P, SearchStrategy[ir.Model]]
Choice = str | int

_MAY_BE_EMPTY = "obstacles"

_MAY_BE_WRITTEN = "routers"
"""Where an author's own function may be given in the place of a name."""


def checked(**more: Collection[Choice]) -> Callable[[Models[P]], Models[P]]:
    """Returns a decorator that holds the arguments of a strategy to what they may be.

    A ``max_..`` is a positive integer. What has a tuple as default is a collection of names or numbers in it, the
    plainest first, and reaches the strategy in that order, so that examples shrink the same whatever order was given;
    only ``obstacles`` may be empty. ``routers`` may hold functions too, which come after the names.
    The docstring then shows them, and not what Hypothesis gives.

    Args:
        more: argument -> what it may hold, where that is more than the default.

    Returns:
        A decorator; what it returns raises InvalidArgument, naming the nearest valid name.
    """

    def decorate(strategy: Models[P]) -> Models[P]:
        arguments = inspect.signature(strategy).parameters
        choices = {name: held.default for name, held in arguments.items() if isinstance(held.default, tuple)} | more

        @functools.wraps(strategy)
        def call(*args: P.args, **kwargs: P.kwargs) -> SearchStrategy[ir.Model]:
            for name, given in kwargs.items():
                if name not in arguments:
                    raise InvalidArgument(f"{strategy.__name__} has no argument '{name}'{nearest(name, arguments)}")
                if name in choices:
                    kwargs[name] = _known(name, given, choices[name])
                elif name.startswith("max_"):
                    _require_positive(name, given)
            return strategy(*args, **kwargs)

        call.__doc__ = _shown(strategy.__doc__ or "", choices)
        return call

    return decorate


def _shown(text: str, choices: Mapping[str, Collection[Choice]]) -> str:
    """The docstring with names in the place of those of the constants that hold them, and with what is raised."""
    text = re.sub(r"\n +draw: .*", "", text)
    for name, known in choices.items():
        values = ", ".join(map(repr, known))
        text = re.sub(rf"(\n +{name}: [^`\n]*)``[A-Z_]+``", rf"\g<1>{values}", text)
    raises = "InvalidArgument: a name or number is unknown, or a number is not positive."
    return f"{text.rstrip()}\n\n    Raises:\n        {raises}\n    "


def _known(what: str, given: object, known: Collection[Choice]) -> tuple[Choice | Callable[..., Any], ...]:
    kind = "names" if all(isinstance(choice, str) for choice in known) else "numbers"
    named = isinstance(given, Collection) and not isinstance(given, str | bytes)
    if not isinstance(given, Collection) or not named or not (given or what == _MAY_BE_EMPTY):
        raise InvalidArgument(f"{what} must be a collection of {kind}, not {given!r}")
    own = [choice for choice in given if callable(choice)] if what == _MAY_BE_WRITTEN else []
    for choice in (choice for choice in given if choice not in own):
        if choice not in known and kind == "names":
            raise InvalidArgument(f"unknown name '{choice}' in {what}{nearest(str(choice), [str(k) for k in known])}")
        if choice not in known:
            raise InvalidArgument(f"unknown number {choice!r} in {what} (it may hold {', '.join(map(str, known))})")
    return (*(choice for choice in known if choice in given), *own)


def _require_positive(name: str, number: object) -> None:
    if not isinstance(number, int) or number < 1:
        raise InvalidArgument(f"{name} must be a positive integer, not {number!r}")
