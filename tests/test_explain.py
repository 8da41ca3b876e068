"""``rewriter explain MODEL NAME``: the guard that stopped each rule, the value at fault, and what to change."""

from __future__ import annotations

import re
from pathlib import Path

import onnx_ir as ir
import pytest
from support import parse

import rewriter
from rewriter.cli import main
from rewriter.explanation.focus import Focus
from rewriter.graph.declines import Reason, no_kernel
from rewriter.io import load
from rewriter.rule import Declined, Rule

ROOT = Path(__file__).parents[1]
MODELS = Path(__file__).parent / "models"
GRANITE = MODELS / "mobius" / "granitemoehybrid_static_unroll_f32.onnx"
BATCHED = MODELS / "hf_blocks" / "gpt_oss__batched_mm__dynamo18.onnx"
GEGLU = MODELS / "genai" / "gemma4_moe_fp32_cpu_b32.onnx"
HIT = MODELS / "hf_blocks" / "qwen3_moe__eager__ts17.onnx"
QUANTIZED = MODELS / "genai" / "gpt_oss_int4_cpu_b32.onnx"
INNER = "model/layers.0/block_sparse_moe/input_linear/MatMul_node_51"
SLICE = "model.layers.1.block_sparse_moe.output_linear.weight__slice_2"
EMBEDDING = "model.embed_tokens.weight"
FUSED = MODELS / "genai" / "gpt_oss_fp32_cpu.onnx"
ROUTER = "model/layers.0/block_sparse_moe/gate/MatMul_node_44"


def concern(path, name, rules="moe-int4"):
    model = load(path)
    focus = Focus(name, model)
    result = rewriter.apply(model, rules, prover=lambda rewrite, run: None, watch=focus.watch)
    return focus.concern(result)


def test_the_guard_that_stopped_a_rule():
    found = concern(GRANITE, ROUTER)
    assert not found.applications
    assert (found.declines[0].rule, found.declines[0].reason) == (
        "matmul-to-matmul-nbits",
        "excluded by the plan (role router)",
    )


def test_the_value_at_fault():
    found = concern(BATCHED, "node_GatherND_28", "experts-int4")
    reasons = {near.rule: (near.reason, near.culprit) for near in found.declines}
    assert reasons["unstack"][0] == "the index depends on an input"
    assert reasons["matmul-to-matmul-nbits"] == ("the weight is not constant: the index depends on an input", "val_28")
    assert not found.unknown


def test_what_a_recogniser_almost_knew():
    found = concern(GRANITE, "model.rotary_emb.cos_cache", "experts-int4")
    assert [near.reason for near in found.unknown] == ["the index depends on an input"]


def test_a_rule_that_is_about_something_else():
    found = concern(BATCHED, "node_GatherND_28", "unstack")
    assert {decline.rule for decline in found.declines} <= {"unstack"}


def test_an_inner_node_goes_with_its_block():
    found = concern(GRANITE, INNER, "fuse-experts")
    assert [(a.rule, a.phase) for a in found.absorbed] == [("fuse-experts", "fuse")]
    assert INNER in found.absorbed[0].removed
    assert not (found.applications or found.declines or found.unknown or found.further)


def test_a_block_that_declines_is_named_at_its_inner_nodes():
    found = concern(GRANITE, INNER, {"phases": [{"name": "p", "rules": ["fuse-experts"]}], "target": "dml"})
    assert not found.absorbed
    assert found.further[0].rule == "fuse-experts"
    assert "target dml" in found.further[0].reason


def test_a_stack_of_which_each_slice_is_rewritten():
    found = concern(GRANITE, "model.layers.0.block_sparse_moe.input_linear.weight", "experts-int4")
    assert re.search(r"4 weights to 4 bits in blocks of 32", found.what)
    assert {a.rule for a in found.applications} >= {"unstack", "matmul-to-matmul-nbits"}


def test_looking_on_changes_nothing():
    model = load(GRANITE)
    watched = rewriter.apply(model, "moe-int4", watch=Focus(ROUTER, model).watch).report
    assert watched == rewriter.apply(model, "moe-int4").report


@pytest.mark.parametrize(
    ("path", "name", "rules", "words"),
    [
        (GRANITE, ROUTER, "moe-int4", ("excluded by the plan", "quantization.exclude")),
        (GRANITE, INNER, "fuse-experts", ("Goes with the rewrite by fuse-experts at", "phase fuse")),
        (BATCHED, "node_GatherND_28", "experts-int4", ("val_28.*made by GatherND", "folded constants")),
        (QUANTIZED, "/model/layers.0/moe/QMoE", "moe-int4", ("quantized already", "qmoe-to-moe")),
        (GRANITE, "model.norm.weight", "moe-int4", ("came near",)),
        (GRANITE, SLICE, "moe-int4", ("moe-to-qmoe +1", "Goes with the rewrite by fuse-experts")),
        (GRANITE, SLICE.partition("__")[0], "moe-int4", ("moe-to-qmoe +1", "Goes with the rewrite by fuse-experts")),
        (GEGLU, "/model/layers.0/moe/MoE", "moe-int4", ("1.32 on: export in float16 .*cuda:sm80@1.32, or export the",)),
        (HIT, "/block/gate/TopK", "moe-int4", ("export with the experts unrolled or batched",)),
        (GRANITE, EMBEDDING, "experts-int4", ("an embedding, which no rule of experts-int4 reads; rule set moe-int4",)),
        (FUSED, "/model/layers.0/moe/MoE", "experts-int4", ("float experts, which no rule of experts-int4 reads",)),
    ],
)  # fmt: skip
def test_what_it_prints(path, name, rules, words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert main(["explain", str(path), name, "-r", rules]) == 0
    out = capsys.readouterr().out
    assert all(re.search(word, out) for word in words), out


@pytest.mark.parametrize(
    ("path", "name", "rules", "words"),
    [
        (GEGLU, "/model/layers.0/moe/MoE", "moe-int4", "experts-int4"),
        (GRANITE, EMBEDDING, "experts-int4", "make it constant|not recognised"),
        (GRANITE, EMBEDDING, "moe-int4", "which no rule"),
        (GRANITE, "lm_head.weight_t", "experts-int4", "which no rule"),
        (FUSED, "/model/layers.0/moe/MoE", "unstack", "which no rule"),
    ],
)
def test_what_it_does_not_print(path, name, rules, words, capsys):
    assert main(["explain", str(path), name, "-r", rules]) == 0
    assert not re.search(words, capsys.readouterr().out)


def test_what_stops_a_rule_where_another_fired_before(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert main(["explain", str(GEGLU), "/model/layers.0/moe/MoE", "--target", "cuda:sm80@1.32"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"moe-drop-zero-biases +1", out)
    assert re.search(r"float has no kernel \(it runs float16, bfloat16\)[\s\S]*to change it +export in float16", out)


def test_the_rule_set_that_a_note_names_reads_what_it_says():
    quantized = rewriter.apply(FUSED, "moe-int4", prover=lambda rewrite, run: None).report
    assert {"moe-to-qmoe", "gather-to-gather-block-quantized"} <= quantized.applied.keys()


# remedies


@pytest.mark.parametrize(
    ("path", "rules", "target", "rule", "reason", "words"),
    [
        (
            GEGLU,
            "moe-int4",
            "cpu@1.32",
            "moe-to-qmoe",
            "'geglu' has no kernel",
            "cuda:sm80@1.32, or export the experts",
        ),
        (GRANITE, "moe-int4", "cuda:sm80@1.31", "fuse-experts", "float has no kernel", "export in float16"),
        (
            GRANITE,
            "moe-int8",
            "cpu@1.31",
            "fuse-experts",
            "rounds activations",
            "rounded_activations=true, or quantize the experts one",
        ),
        (GRANITE, "moe-int4", "dml@1.28", "fuse-experts", "dml@1.28", "by experts-int4"),
        (HIT, "fuse-experts", "cpu@1.32", "fuse-experts", "the trace fixed", "with no loop over those"),
    ],
)
def test_a_decline_says_what_helps(path, rules, target, rule, reason, words):
    report = rewriter.apply(path, rules, target=target, prover=lambda rewrite, run: None).report
    found = [d for d in report.declines if d.rule == rule and reason in d.reason]
    assert found and all(words in d.remedy for d in found), report.declines


def test_what_the_plan_keeps_in_float_is_expected_and_says_how_to_change_it():
    report = rewriter.apply(GRANITE, "moe-int4", prover=lambda rewrite, run: None).report
    routers = [d for d in report.declines if d.reason == "excluded by the plan (role router)"]
    assert routers and all(d.expected and "quantization.exclude" in d.remedy for d in routers)


def test_a_reason_keeps_its_remedy_on_its_way():
    inner = Reason("float has no kernel", "export in float16")
    declined = no_kernel("QMoE", "cuda", inner, ir.Value(name="x"), instead="do without")
    assert (declined.reason, declined.reason.remedy) == (
        "QMoE on target cuda: float has no kernel",
        "export in float16, or do without",
    )
    assert no_kernel("QMoE", "cuda", "no reason", ir.Value(name="x")).reason.remedy == "rewrite for another --target"
    assert Reason(Reason("a", "b", expected=True)).expected


class Never(Rule):
    """A rule of another package, which says itself what helps, or does not."""

    def __init__(self, remedy, *, expected):
        super().__init__(name="never")
        self._declined = Declined("alpha is not 1", remedy=remedy, expected=expected)

    def pattern(self, op, x):
        return op.Relu(x)

    def rewrite(self, op, x):
        raise self._declined


@pytest.mark.parametrize(("own", "expected"), [("", False), ("write it so", False), ("nothing", True)])
def test_a_rule_of_another_package_says_itself_what_helps(own, expected):
    model = parse("g (float[2] x) => (float[2] y) { y = Relu (x) }")
    (decline,) = rewriter.apply(model, [Never(own, expected=expected)]).report.declines
    assert (decline.reason, decline.remedy, decline.expected) == ("alpha is not 1", own, expected)
    assert type(decline.reason) is str
    assert decline.culprit == decline.node
