"""JSON Schema of a report as JSON, made from the records themselves and from what their docstrings say."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import typing
from importlib import resources
from typing import Any

from pydantic import TypeAdapter

from rewriter import report
from rewriter.graph.walk import walk

SHIPPED = resources.files("rewriter") / "report.schema.json"

_ATTRIBUTE = re.compile(r" {4}(\w+): (.*)")
_NUMBER = {"anyOf": [{"type": "number"}, {"enum": ["inf", "-inf", "nan"]}]}


def json_schema(kind: type = report.Report) -> dict[str, Any]:
    """Returns the JSON Schema of a record as ``rewriter.report.document`` gives it.

    Args:
        kind: the record; a ``Report`` is what ``apply --report`` writes and ``explain --json`` prints.
    """
    found: dict[str, Any] = _tidied(TypeAdapter(kind).json_schema(mode="serialization"))
    definitions = found.pop("$defs", {})
    kinds = {hint.__name__: hint for hint in walk([kind], _within, limit=None) if dataclasses.is_dataclass(hint)}
    for name, record in [(kind.__name__, found), *definitions.items()]:
        _describe(record, kinds[name])
    version = {"const": report.SCHEMA_VERSION, "description": "of this schema"}
    summed_up = _summed_up() if kind is report.Report else {}
    properties = {"schema_version": version, **summed_up, **found["properties"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"{kind.__name__} of onnx-moe-rewriter",
        "description": found["description"],
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
        "$defs": definitions,
    }


def _summed_up() -> dict[str, Any]:
    """What a report as JSON holds beside the fields of its record."""
    error = _tidied(TypeAdapter(report.LayerError).json_schema(mode="serialization"))
    _describe(error, report.LayerError)
    error["properties"]["worst"] = {"type": "string", "description": "name of the weight that has it"}
    shown = {key: error[key] for key in ("type", "properties", "required", "additionalProperties")}
    about = "output errors by layer and role, the worst first; empty without a calibration"
    counts = {"type": "object", "additionalProperties": {"type": "integer"}}
    return {
        "applied": {**counts, "description": "rule -> number of applications"},
        "output_errors": {"type": "array", "items": shown, "description": about},
    }


def schema_text() -> str:
    return json.dumps(json_schema(), indent=2) + "\n"


def _within(hint: Any) -> list[Any]:
    """What a type is made of: its arguments, and of a record the types of its fields."""
    fields = typing.get_type_hints(hint).values() if dataclasses.is_dataclass(hint) else ()
    return [*typing.get_args(hint), *fields]


def _describe(record: dict[str, Any], kind: type) -> None:
    """Says what the docstring says, and that every field is there and no other."""
    title, texts = _docs(kind)
    record["description"] = title
    for field in dataclasses.fields(kind):
        entry = record["properties"][field.name]
        entry.pop("default", None)
        entry["description"] = texts[field.name]
    record["required"] = [field.name for field in dataclasses.fields(kind)]
    record["additionalProperties"] = False


def _docs(kind: type) -> tuple[str, dict[str, str]]:
    title, _, rest = (inspect.getdoc(kind) or "").partition("\n")
    texts: dict[str, str] = {}
    name = ""
    for line in rest.partition("Attributes:\n")[2].splitlines():
        found = _ATTRIBUTE.fullmatch(line)
        if found:
            name = found[1]
            texts[name] = found[2]
        elif line.strip():
            texts[name] += f" {line.strip()}"
    return title, texts


def _tidied(schema: Any) -> Any:
    """Drops titles that pydantic derives from names; numbers may be what JSON has no word for."""
    if isinstance(schema, dict):
        kept = {k: _tidied(v) for k, v in schema.items() if not (k == "title" and isinstance(v, str))}
        return {**{k: v for k, v in kept.items() if k != "type"}, **_NUMBER} if kept.get("type") == "number" else kept
    return [_tidied(value) for value in schema] if isinstance(schema, list) else schema
