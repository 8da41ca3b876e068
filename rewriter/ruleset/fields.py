"""Types of the fields of the YAML format that pydantic has no word for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_args

from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema

from rewriter.errors import nearest
from rewriter.quantize import plan
from rewriter.quantize.lossless import NAME as LOSSLESS
from rewriter.ruleset.faults import fault, show
from rewriter.text import names

_RULE_ID = r"^[a-z0-9]+(-[a-z0-9]+)*$"
_RULE_ENTRY: dict[str, Any] = {
    "description": "A rule's id, alone or with its options.",
    "anyOf": [
        {"type": "string", "pattern": _RULE_ID},
        {
            "type": "object",
            "minProperties": 1,
            "maxProperties": 1,
            "propertyNames": {"pattern": _RULE_ID},
            "additionalProperties": {"type": ["object", "null"]},
        },
    ],
}


@dataclass(frozen=True)
class RuleEntry:
    """A rule as a phase lists it: its id and the options given."""

    name: str
    options: Mapping[str, object]


def exact(literal: Any) -> BeforeValidator:
    """Returns a validator that keeps ``False`` and ``0.0`` from passing for a ``Literal``'s ``0``."""
    values = get_args(literal)
    types = {type(value) for value in values}

    def check(value: object) -> object:
        if type(value) not in types:
            raise fault(f"Input should be {names(list(map(repr, values)), 'or')}, not {show(value)}")
        return value

    return BeforeValidator(check)


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _rule_entry(value: object) -> RuleEntry:
    if isinstance(value, str):
        return RuleEntry(value, {})
    if isinstance(value, dict) and len(value) == 1:
        ((name, options),) = value.items()
        if isinstance(name, str) and (options is None or isinstance(options, dict)):
            return RuleEntry(name, options or {})
    raise fault(f"a rule is its id, or 'id: {{option: value}}', not {show(value)}")


def _layers(value: object) -> tuple[plan.Layers, ...]:
    try:
        return plan.parse_layers(value)
    except ValueError as error:
        raise fault(f"Input {error}") from error


def _algorithm(value: object) -> str:
    """Returns the algorithm; of a list, lossless and the one behind it, with a blank between them."""
    listed = value if isinstance(value, list) and value else [value]
    known = plan.algorithms()
    for entry in listed:
        name = entry if isinstance(entry, str) else repr(entry)
        if name not in known:
            raise fault(f"unknown algorithm '{name}'{nearest(name, known)}")
    if len(listed) > 2 or (len(listed) == 2 and (listed[0] != LOSSLESS or listed[1] == LOSSLESS)):
        raise fault(f"of a list of algorithms the first is {LOSSLESS}, and one follows for what lies on no grid")
    return " ".join(map(str, listed))


def _algorithm_schema() -> dict[str, Any]:
    one: dict[str, Any] = {"type": "string", "enum": list(plan.algorithms())}
    return {"anyOf": [one, {"type": "array", "items": one, "minItems": 2, "maxItems": 2}]}


Algorithm = Annotated[
    str,
    PlainValidator(_algorithm),
    Field(json_schema_extra=lambda schema: schema.update(_algorithm_schema())),
]
RuleField = Annotated[RuleEntry, PlainValidator(_rule_entry), WithJsonSchema(_RULE_ENTRY)]
Names = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    Field(min_length=1),
    BeforeValidator(_listed, json_schema_input_type=str | list[str]),
]
Layers = Annotated[tuple[plan.Layers, ...], PlainValidator(_layers, json_schema_input_type=int | str | list[int | str])]
Ratio = Annotated[float, Field(ge=0, allow_inf_nan=False)]
