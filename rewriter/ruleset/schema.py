"""JSON Schema of the YAML format, so that editors check and complete rule sets.

The file that ships with the package leaves rule ids open, so that a new rule does not touch it;
``rewriter rules --schema`` prints the schema with every installed rule and its options.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import json
from importlib import resources
from typing import Any

from rewriter.ruleset import document
from rewriter.ruleset.catalogue import RuleInfo, catalogue
from rewriter.ruleset.document import RuleSetDocument

SHIPPED = resources.files("rewriter") / "ruleset.schema.json"


def json_schema(*, rules: bool = True) -> dict[str, Any]:
    """Returns the JSON Schema of a rule set.

    Args:
        rules: with the installed rules and their options; otherwise any rule id and options are accepted.
    """
    schema: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **_without_titles(RuleSetDocument.model_json_schema()),
    }
    own = _docstrings()
    for name, described in {RuleSetDocument.__name__: schema, **schema["$defs"]}.items():
        for base in getattr(document, name, object).__mro__:
            for field, text in own.get(base.__name__, {}).items():
                described["properties"][field].setdefault("description", text)
    if rules:
        entry = schema["$defs"]["PhaseDocument"]["properties"]["rules"]["items"]
        entry["anyOf"] = _rule_entries(catalogue())
        schema["properties"]["options"] |= {
            "properties": {info.name: _options(info) for info in catalogue() if info.options},
            "additionalProperties": False,
        }
    return schema


def schema_text(*, rules: bool = True) -> str:
    return json.dumps(json_schema(rules=rules), indent=2) + "\n"


def _rule_entries(infos: tuple[RuleInfo, ...]) -> list[dict[str, Any]]:
    return [{"const": info.name, "description": info.title} for info in infos] + [
        {
            "type": "object",
            "description": info.title,
            "properties": {
                info.name: {**_options(info), "type": ["object", "null"]},
            },
            "required": [info.name],
            "additionalProperties": False,
        }
        for info in infos
    ]


def _options(info: RuleInfo) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            option.name: {
                **option.adapter.json_schema(),
                "default": option.default,
                **({"description": option.description} if option.description else {}),
            }
            for option in info.options
        },
        "additionalProperties": False,
    }


def _docstrings() -> dict[str, dict[str, str]]:
    """Returns what stands under each field of each class; pydantic would read the source at every start."""
    found: dict[str, dict[str, str]] = {}
    for made in ast.parse(inspect.getsource(document)).body:
        if isinstance(made, ast.ClassDef):
            for field, below in itertools.pairwise(made.body):
                match field, below:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                        found.setdefault(made.name, {})[name] = inspect.cleandoc(text)
    return found


def _without_titles(schema: Any) -> Any:
    """Drops the titles that pydantic derives from field names, which say nothing."""
    if isinstance(schema, dict):
        return {
            key: _without_titles(value)
            for key, value in schema.items()
            if not (key == "title" and isinstance(value, str))
        }
    return [_without_titles(value) for value in schema] if isinstance(schema, list) else schema
