"""A fault that pydantic finds becomes one RuleSetError, in YAML's terms, that points at its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from rewriter.errors import nearest
from rewriter.ruleset.source import Location, Source

T = TypeVar("T")


def fault(message: str) -> PydanticCustomError:
    """Returns a fault whose message is whole; ``Input`` at its beginning stands for the field."""
    return PydanticCustomError("fault", "{message}", {"message": message})


def validated(source: Source, base: Location, validate: Callable[[], T]) -> T:
    """Runs a validation of the part of the source at ``base``.

    Raises:
        RuleSetError: in the place of pydantic's error, for its first fault.
    """
    try:
        return validate()
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
    location = (*base, *fault["loc"])
    if fault["type"] == "unknown_key":
        location = (*location, fault["ctx"]["key"])
        raise source.error(location, fault["msg"], key=True)
    if fault["type"] == "missing":
        raise source.error(location[:-1], f"'{location[-1]}' is missing")
    raise source.error(location, _message(fault, location))


def _message(fault: ErrorDetails, location: Location) -> str:
    message = fault["msg"]
    name = next((part for part in reversed(location) if isinstance(part, str)), "rule set")
    if fault["type"] == "fault":
        return message.replace("Input", f"'{name}'", 1) if message.startswith("Input ") else message
    # Said in YAML's terms.
    if fault["type"] in ("model_type", "dict_type"):
        message = "Input should be a mapping"
    if fault["type"] == "tuple_type":
        message = "Input should be a valid list"
    if fault["type"] == "too_short":
        return f"'{name}' is empty"
    if message.startswith("Input "):
        hint = ""
        if fault["type"] == "literal_error" and isinstance(fault["input"], str):
            hint = nearest(fault["input"], fault["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", "))
        return f"'{name}'{message.removeprefix('Input')}, not {show(fault['input'])}{hint}"
    return f"'{name}': {message}"


def show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
