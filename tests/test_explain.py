"""``rewriter explain MODEL NAME``: the guard that stopped each rule, the value at fault, and what to change."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support import parse

import rewriter
from rewriter.cli import main
from rewriter.explain.focus import Focus
from rewriter.io import load
from rewriter.report.hints import HINTS, PLAN, remedy
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
    assert re.search(r"4 slices to 4 bits in blocks of 32", found.what)
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
        (GEGLU, "/model/layers.0/moe/MoE", "moe-int4", ("1.32 on: export in float16 .*cuda:sm80@1.32; or export the",)),
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


# hints


@pytest.mark.parametrize("known", [*PLAN, *HINTS], ids=lambda known: f"{known.reason} {' '.join(known.rules)}")
def test_a_hint_is_about_a_reason_that_some_rule_gives(known):
    sources = [*(ROOT / "rules").rglob("*.py"), *(ROOT / "rewriter").rglob("*.py")]
    texts = [
        text for file in sources if file.name != "hints.py" for text in re.findall(r'f?"([^"\n]+)"', file.read_text())
    ]
    texts = [re.sub(r"\{[^{}]*\}", value, text) for text in texts for value in ("x", "float", "geglu")]
    assert any(re.search(known.reason, text) for text in texts)


@pytest.mark.parametrize(
    ("rule", "reason", "words"),
    [
        ("matmul-to-matmul-nbits", "the weight is not constant: the index depends on an input", "make it constant"),
        ("matmul-to-matmul-nbits", "the float weight would stay in the model: Add also reads it", "copy"),
        ("moe-to-qmoe", "K = 704 of fc2 is not divisible by the block size 128, as QMoE needs", "block_size=32"),
        ("fuse-experts", "QMoE on target cpu@1.31: fc3 beside 'relu' has no kernel", "experts-int4"),
        ("moe-to-qmoe", "target dml@1.28 has no QMoE", "export the experts unrolled"),
        ("fuse-experts", "QMoE on target cpu@1.32: activation 'geglu' has no kernel (it runs relu)", "cuda:sm80@1.32"),
        ("qmoe-to-moe", "MoE on target dml@1.28: use_sparse_mixer has no kernel", "--target"),
        ("any", "no such reason", ""),
    ],
)
def test_hints(rule, reason, words):
    found = remedy(rule, reason, shipped=True)
    assert words in found
    assert bool(words) == bool(found)


def test_only_a_rule_that_reads_linears_is_sent_to_them():
    assert "experts-int4" not in remedy("moe-to-qmoe", "target dml@1.28 has no QMoE", shipped=True)
    geglu = "QMoE on target cpu@1.32: activation 'geglu' has no kernel (it runs relu)"
    assert "unrolled" in remedy("moe-to-qmoe", geglu, shipped=True)
    assert "unrolled" not in remedy("fuse-experts", geglu, shipped=True)


class Never(Rule):
    """A rule of another package, which says itself what helps, or does not."""

    def __init__(self, reason, remedy=""):
        super().__init__(name="never")
        self._declined = Declined(reason, remedy=remedy)

    def pattern(self, op, x):
        return op.Relu(x)

    def rewrite(self, op, x):
        raise self._declined


@pytest.mark.parametrize(
    ("reason", "own", "expected"),
    [("alpha is not 1", "", False), ("alpha is not 1", "write it so", False), ("excluded by the plan", "", True)],
)
def test_a_rule_of_another_package_says_itself_what_helps(reason, own, expected):
    model = parse("g (float[2] x) => (float[2] y) { y = Relu (x) }")
    (decline,) = rewriter.apply(model, [Never(reason, own)]).report.declines
    assert (decline.reason, decline.expected) == (reason, expected)
    assert decline.remedy == (own or ("take its role or name out of quantization.exclude of the rule set" * expected))
    assert type(decline.reason) is str
    assert decline.culprit == decline.node
