"""The rule sets and the schema that ship with the package."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest

from rewriter.quantize.types import WeightSpec
from rewriter.roles import ROLES
from rewriter.ruleset import discover, json_schema, load, schema_text
from rewriter.ruleset.schema import SHIPPED

SETS = sorted((Path(__file__).parents[2] / "rules" / "sets").glob("*.yaml"))


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """Offers this project's own rules, also where it is not installed."""
    entry = EntryPoint("shipped", "rewriter.rules", discover.GROUP)
    monkeypatch.setattr(discover, "metadata", SimpleNamespace(entry_points=lambda *, group: [entry]))


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.stem)
def test_shipped_set_loads_and_describes_itself(path):
    own = path.read_text(encoding="utf-8").partition("description: ")[2].partition("\n")[0]
    found = load(path.stem)
    assert found.description == own and own.endswith(".")
    assert not found.plan.unmatched([], ROLES)


@pytest.mark.parametrize("bits", [4, 8])
def test_what_the_sets_quantize(bits):
    spec = WeightSpec(algorithm={4: "mse-search", 8: "rtn"}[bits], bits=bits, block_size=32, symmetric=True)

    def plan(name, role):
        return load(f"{name}-int{bits}").plan.resolve(node="", weight="", role=role, layer=0)

    born = replace(spec, lossless=bits == 4)  # what was trained in few bits is kept so first
    for role in ("expert.down", "expert.gate_up", "shared_expert.down"):
        assert (plan("experts", role), plan("moe", role)) == (spec, born)
    for role in ("lm_head", "attention.q", ""):
        assert isinstance(plan("experts", role), str)
        assert plan("moe", role) == born
    assert isinstance(plan("experts", "router"), str)
    assert plan("moe", "router") == "excluded by the plan (role router)"


def test_experts_are_never_fused():
    assert [phase.name for phase in load("unstack").phases] == ["unstack"]
    for name in ("experts-int4", "experts-int8"):
        assert [phase.name for phase in load(name).phases] == ["unstack", "unbatch", "quantize"]


def test_shipped_schema_is_up_to_date():
    remedy = "python -c 'from rewriter.ruleset.schema import *; SHIPPED.write_text(schema_text(rules=False))'"
    # As data: pydantic's versions write a bound as 0 or 0.0.
    assert json.loads(SHIPPED.read_text(encoding="utf-8")) == json_schema(rules=False), f"regenerate it: {remedy}"
    assert json.loads(schema_text()) == json.loads(json.dumps(json_schema()))


def test_schema_is_closed_and_described():
    schema = json_schema(rules=False)
    for model in (schema, *schema["$defs"].values()):
        assert model["additionalProperties"] is False and model["description"]
        assert all("description" in entry for entry in model["properties"].values())
    spec = schema["$defs"]["SpecDocument"]["properties"]
    assert {name: entry["default"] for name, entry in spec.items()} | {"lossless": False} == vars(WeightSpec())
    assert not any("default" in entry for entry in schema["$defs"]["OverrideDocument"]["properties"].values())
