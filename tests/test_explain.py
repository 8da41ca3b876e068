"""``rewriter explain MODEL NAME``: the guard that stopped each rule, the value at fault, and what to change."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import rewriter
from rewriter.cli import main
from rewriter.cli.concerns import Focus
from rewriter.io import load
from rewriter.report.hints import HINTS, hint

ROOT = Path(__file__).parents[1]
MODELS = Path(__file__).parent / "models"
GRANITE = MODELS / "mobius" / "granitemoehybrid_static_unroll_f32.onnx"
BATCHED = MODELS / "hf_blocks" / "gpt_oss__batched_mm__dynamo18.onnx"
QUANTIZED = MODELS / "genai" / "gpt_oss_int4_cpu_b32.onnx"
INNER = "model/layers.0/block_sparse_moe/input_linear/MatMul_node_51"
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
    ],
)  # fmt: skip
def test_what_it_prints(path, name, rules, words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert main(["explain", str(path), name, "-r", rules]) == 0
    out = capsys.readouterr().out
    assert all(re.search(word, out) for word in words), out


# hints


@pytest.mark.parametrize("known", HINTS, ids=lambda known: known.reason)
def test_a_hint_is_about_a_reason_that_some_rule_gives(known):
    sources = [*(ROOT / "rules").rglob("*.py"), *(ROOT / "rewriter").rglob("*.py")]
    texts = [re.sub(r"\{[^{}]*\}", "x", text) for file in sources if file.name != "hints.py"
             for text in re.findall(r'f?"([^"\n]+)"', file.read_text())]  # fmt: skip
    assert any(re.search(known.reason, text) for text in texts)


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("the weight is not constant: the index depends on an input", "make it constant"),
        ("the float weight would stay in the model: Add also reads it", "copy"),
        ("K = 704 of fc2 is not divisible by the block size 128, as QMoE needs", "block_size=32"),
        ("QMoE on target cpu@1.31: it has no geglu", "--target"),
        ("no such reason", ""),
    ],
)
def test_hints(reason, words):
    known = hint(reason)
    assert words in (known.advice if known else "")
    assert bool(words) == bool(known)
