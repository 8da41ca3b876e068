"""``rewriter explain``: the dry run."""

from __future__ import annotations

import json
import re

import pytest
from cli_models import GRANITE, MODELS, ROUTER, STACK, linear, tree, valid

import rewriter
from rewriter.explanation.focus import Concern
from rewriter.report import Report
from rewriter.text import shrink


def test_explain_says_what_would_happen_and_writes_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr("rewriter.quantize.job.QuantizationJob.quantize", pytest.fail)
    monkeypatch.setattr("rewriter.parity.local.LocalProver.__call__", pytest.fail)
    code, out, err = run("explain", GRANITE, "-r", "experts-int4")
    assert (code, err, tree(tmp_path)) == (0, "", {})
    for words in (
        r"a dry run, nothing is written",
        r"unstack +16 +model/layers.0/",
        r"2 +matmul-to-matmul-nbits: not included by the plan \(role router\)",
        r"expert.down +8 +4 +5.000 +65.5 kB +10.2 kB",
        r"131 kB +lm_head.weight_t \(lm_head\) *\n +read by MatMul; matmul-to-matmul-nbits: not included by the plan",
        r"and \d+ more, ",
    ):
        assert re.search(words, out), words


def test_the_forecast_is_what_apply_makes(run):
    forecast = run("explain", GRANITE)[1].splitlines()[-1]
    report = json.loads(run("apply", GRANITE, "-o", "o", "--json", "--no-check")[1])
    assert forecast == f"Tensors {shrink(report['bytes_before'], report['bytes_after'])}"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (ROUTER, (r"node, MatMul, router, layer 0", r"stopped by +not included by the plan \(role router\)")),
        (STACK, (r"weight, FLOAT\[4, 64, 64\], disappears", r"unstack +4", r"matmul-to-matmul-nbits +4")),
        (f"{STACK}__slice_2", (r"slice, \[64, 64\], to 4 bits in blocks of 32", r"matmul-to-matmul-nbits +1")),
        ("lm_head.weight_t", (r"weight, FLOAT\[64, 512\], stays", r"not included by the plan \(role lm_head\)")),
        ("model.rotary_emb.cos_cache", (r"weight, FLOAT\[\d+, \d+\], stays", r"something else: unstack")),
        ("logits", (r"logits  node, ",)),
    ],
)
def test_explain_one_name(run, name, words):
    code, out, _ = run("explain", GRANITE, name, "-r", "experts-int4")
    assert code == 0
    assert out.startswith(name)
    for expected in words:
        assert re.search(expected, out), expected


def test_explain_names_what_is_at_fault(run):
    out = run("explain", GRANITE, "model.rotary_emb.cos_cache", "-r", "unstack")[1]
    assert "the index depends on an input" in out
    assert re.search("at fault +'\\S+/Gather_node_\\d+', Gather node", out)


def test_a_node_without_a_name_goes_by_its_output(run):
    model = linear(node="")
    out = run("explain", model, "-r", "experts-int4")[1]
    assert re.search(r"not included by the plan \(no role\) *\n +y;", out)
    assert "y  node, MatMul" in run("explain", model, "y")[1]


def test_explain_as_json_is_a_report(run):
    code, out, err = run("explain", GRANITE, "--json")
    found = valid(out, Report)
    assert (code, err) == (0, "")
    assert found["applied"]["moe-to-qmoe"] == 2
    assert found["proofs"] == []
    assert {w["relative_rms"] for w in found["weights"]} == {"nan"}
    assert found["bytes_after"] < found["bytes_before"]
    assert found["model"] == str(GRANITE)
    assert {left["reason"] for left in found["left"] if left["role"] == "router"} == {
        "excluded by the plan (role router)"
    }


def test_explain_of_one_name_as_json(run):
    found = valid(run("explain", GRANITE, ROUTER, "--json")[1], Concern)
    assert found["name"] == ROUTER
    (decline,) = found["declines"]
    assert decline["reason"] == "excluded by the plan (role router)"
    assert decline["culprit"] == ROUTER
    assert decline["remedy"] == "take its role or name out of quantization.exclude of the rule set"
    assert decline["expected"] is True
    assert found["applications"] == []


def test_experts_that_no_rule_of_the_set_reads(run):
    model = MODELS / "genai" / "gpt_oss_fp32_cpu.onnx"
    line = "MoE nodes hold 197 kB of float experts, which no rule of experts-int4 reads; rule set moe-int4 does.\n"
    assert line in run("explain", model, "-r", "experts-int4")[1]
    assert line in run("apply", model, "-r", "experts-int4", "-o", "out", "--no-check")[1]
    for rules in ("moe-int4", "fuse-experts"):
        assert "float experts" not in run("explain", model, "-r", rules)[1]
    assert "float experts" not in run("explain", GRANITE, "-r", "unstack")[1]


def test_a_dry_run_counts_the_weights_that_a_run_quantizes(tmp_path):
    model = MODELS / "mobius" / "gemma4_fused_moe_head_f32.onnx"  # its embedding and its head are one table
    result = rewriter.apply(model, overrides={"parity.local": "none"})
    before = {weight.name for weight in result.report.weights}
    result.save(tmp_path / "out")
    assert len(before) == len(result.report.weights) == len(rewriter.explain(model).weights)
    assert before == {weight.name for weight in result.report.weights}


PLAN = """
extends: moe-int4
quantization:
  exclude: [{role: attention.o}]
  overrides:
    - {role: "attention.*", bits: 8}
    - {role: "attention.*", block_size: 64, bits: 8}
    - {role: attention.o, bits: 8}
    - {role: expert.down, layers: "40-50", bits: 8}
"""


def test_each_line_of_the_plan_says_how_many_weights_it_is_about(run, tmp_path):
    (tmp_path / "mine.yaml").write_text(PLAN)
    model = MODELS / "mobius" / "qwen3_moe_dense_experts_f32.onnx"
    report = rewriter.explain(model, rules=tmp_path / "mine.yaml")
    lines = {f"{line.kind} {line.selects}".strip(): line for line in report.rules.plan[:3]}
    assert lines["default"].weights == len(report.weights) == 20
    assert lines["exclude role router"].weights == lines["exclude role attention.o"].weights == 2
    hidden, part, excluded, absent = report.rules.plan[3:]
    assert (hidden.weights, hidden.overruled) == (4, 4) and hidden.idle == "overruled by other lines for all of them"
    assert (part.weights, part.overruled) == (4, 2) and part.idle == "overruled by other lines for 2 of them"
    assert (excluded.weights, excluded.overruled) == (2, 2)
    assert (absent.weights, absent.idle) == (0, "picks no weight")
    out = run("explain", model, "-r", tmp_path / "mine.yaml")[1]
    assert re.search(r"2  exclude role router: stays float", out)
    assert re.search(r"0  override role expert.down, layer 40-50: bits 8\s+picks no weight", out)


def test_what_is_below_a_table_takes_the_width_of_the_terminal(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = run("explain", GRANITE)[1]
    assert "stored: bits of each number, with its scales and zero points\n" in out


def test_what_was_not_expected_comes_first(run):
    out = run("explain", MODELS / "genai" / "gemma4_moe_fp32_cpu_b32.onnx")[1]
    reasons = out.partition("What declined")[2].partition("Quantized weights")[0]
    assert reasons.index("activation 'geglu' has no kernel") < reasons.index("excluded by the plan (role router)")
    assert re.search(r"/model/layers.0/moe/MoE; 197 kB stay float", reasons)


def test_scales_and_biases_are_no_weights_left_in_float():
    for model in ("genai/gpt_oss_int4_cpu_b32", "genai/gpt_oss_fp32_cpu"):
        left = rewriter.apply(MODELS / f"{model}.onnx", prover=lambda rewrite, run: None).report.left
        assert {weight.role for weight in left} <= {"router", ""}
        assert not [weight.name for weight in left if re.search("bias|scale", weight.name)]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lm_head", r"^lm_head  role, 1 node; 1 weight to 4 bits"),
        ("expert.down", r"^expert\.down  role, 8 nodes; 8 weights to 4 bits"),
        ("router", r"(?s)^router  role, 2 nodes; all weights stay float.*excluded by the plan"),
        ("*.o_proj.*", r"pattern, 2 nodes; 2 weights to 4 bits"),
        ("model.layers.0.mlp.experts.2.gate_proj.weight_t", r"disappears: 1 weight to 4 bits.*expert\.gate_up"),
        ("model.layers.0.mlp.experts.2.{gate,up}_proj.weight_t", r"slice, \[64, 64\], to 4 bits"),
    ],
)
def test_roles_globs_and_the_models_own_names_are_explained(run, name, words):
    code, out, err = run("explain", MODELS / "mobius" / "qwen3_moe_dense_experts_f32.onnx", name)
    assert (code, err) == (0, "") and re.search(words, out), out
