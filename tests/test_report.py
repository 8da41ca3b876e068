"""The report as data: its JSON, the schema that is published with it, and what a run writes into it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jsonschema
import pytest

import rewriter
from rewriter.cli import main
from rewriter.report import SCHEMA_VERSION, Comparison, Metrics, Report
from rewriter.report.schema import SHIPPED, json_schema, schema_text

MODELS = Path(__file__).parent / "models"
GRANITE = MODELS / "mobius" / "granitemoehybrid_static_unroll_f32.onnx"
REMEDY = "python -c 'from rewriter.report.schema import *; SHIPPED.write_text(schema_text())'"


def valid(report):
    jsonschema.Draft202012Validator(json_schema()).validate(report)
    return report


@pytest.fixture(scope="module")
def result():
    return rewriter.apply(GRANITE, rules="experts-int4")


def test_the_published_schema_is_up_to_date():
    assert SHIPPED.read_text(encoding="utf-8") == schema_text(), f"regenerate it: {REMEDY}"


def test_the_schema_is_one_and_describes_every_field():
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    for record in (schema, *schema["$defs"].values()):
        assert record["description"]
        assert all(entry["description"] for entry in record["properties"].values())
        assert set(record["required"]) == set(record["properties"])


def test_the_version_is_held():
    assert (
        json_schema()["properties"]["schema_version"]["const"]
        == SCHEMA_VERSION
        == Report("", "").to_json()["schema_version"]
    )
    with pytest.raises(jsonschema.ValidationError):
        valid({**Report("", "").to_json(), "schema_version": SCHEMA_VERSION + 1})


@pytest.mark.parametrize("change", [{"bytes_after": "few"}, {"more": 1}, {"applications": [{}]}])
def test_what_is_no_report_is_refused(change):
    with pytest.raises(jsonschema.ValidationError):
        valid({**Report("", "").to_json(), **change})


def test_a_real_report_validates(tmp_path):
    file = tmp_path / "report.json"
    arguments = ["apply", str(GRANITE), "-o", str(tmp_path / "out"), "-r", "moe-int4", "--report", str(file), "-q"]
    assert main(arguments) == 0
    found = valid(json.loads(file.read_text(), parse_constant=pytest.fail))
    assert found["rules"]["phases"][-1]["rules"][0]["options"]
    assert found["parity"]["outputs"]["logits"]["top1"] <= 1
    assert found["model"] == str(GRANITE)


def test_what_json_has_no_word_for_validates():
    parity = Comparison("cpu", 0, {"y": Metrics(math.inf, math.nan, (), 0.0, -math.inf)})
    found = valid(Report("", "", parity=parity).to_json())
    assert found["parity"]["outputs"]["y"] == {
        "relative_l2": "inf", "max_abs": "nan", "worst_index": [], "cosine": 0.0, "snr_db": "-inf",
        "top1": None, "kl": None, "finite": 1.0, "undefined": False,
    }  # fmt: skip


def test_sizes_add_up(result):
    report = result.report
    assert sum(size.bytes_before for size in report.sizes) == report.bytes_before == 666_944
    assert sum(size.bytes_after for size in report.sizes) == report.bytes_after
    sizes = {size.family: (size.bytes_before, size.bytes_after) for size in report.sizes}
    assert sizes["expert"] == (196_608, 30_720)
    assert sizes["lm_head"] == (131_072, 131_072)


def test_the_rule_set_is_there_with_what_was_changed_in_it():
    changed = {"quantization.default.bits": 8, "parity.seed": 3}
    used = rewriter.apply(GRANITE, rules="experts-int4", overrides=changed).report.rules
    assert [(phase.name, [rule.name for rule in phase.rules]) for phase in used.phases] == [
        ("unstack", ["unstack"]),
        ("unbatch", ["einsum-to-matmul", "unbatch"]),
        ("quantize", ["matmul-to-matmul-nbits", "gemm-to-matmul-nbits"]),
    ]
    assert [(line.kind, line.selects) for line in used.plan] == [
        ("default", ""),
        ("include", "role expert.* or shared_expert.*"),
    ]
    assert used.plan[0].values["bits"] == 8
    assert used.parity["seed"] == 3


def test_an_application_names_what_it_took_along(result):
    by_rule = {application.rule: application for application in result.report.applications}
    assert by_rule["unstack"].node in by_rule["unstack"].removed
    left = {node.name for node in result.ir_model.graph}
    taken = [name for a in result.report.applications for name in a.removed]
    assert all(len(set(a.removed)) == len(a.removed) for a in result.report.applications)
    assert not {name for name in taken if "Gather_node_48" in name} & left
    assert any("Gather_node_48" in name for name in taken)
