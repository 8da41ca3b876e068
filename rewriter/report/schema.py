"""JSON Schema of a report as JSON, made from the records themselves and from what their docstrings say."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from importlib import resources
from typing import Any

from pydantic import TypeAdapter

from rewriter import report

SHIPPED = resources.files("rewriter") / "report.schema.json"

_ATTRIBUTE = re.compile(r" {4}(\w+): (.*)")
_NUMBER = {"anyOf": [{"type": "number"}, {"enum": ["inf", "-inf", "nan"]}]}


def json_schema() -> dict[str, Any]:
    """Returns the JSON Schema of what ``Report.to_json`` returns."""
    found: dict[str, Any] = _tidied(TypeAdapter(report.Report).json_schema(mode="serialization"))
    definitions = found.pop("$defs")
    for name, record in [("Report", found), *definitions.items()]:
        _describe(record, getattr(report, name))
    properties = {
        "schema_version": {"const": report.SCHEMA_VERSION, "description": "of this schema"},
        "applied": {
            "type": "object",
            "additionalProperties": {"type": "integer"},
            "description": "rule -> number of applications",
        },
        **found["properties"],
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Report of rewriter apply",
        "description": found["description"],
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
        "$defs": definitions,
    }


def schema_text() -> str:
    """Returns the JSON Schema as the text of a file."""
    return json.dumps(json_schema(), indent=2) + "\n"


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
