"""``rewriter inspect``: what the real models are."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from drawn_grids import floats, integers
from support import parse

import rewriter
from rewriter.cli import main
from rewriter.graph.contents import Slot
from rewriter.inspection.model import inspect
from rewriter.inspection.weights import role_of_tensor
from rewriter.io import load
from rewriter.quantize.formats import MXFP4
from rewriter.roles import Role
from rewriter.ruleset import rule_sets

MODELS = Path(__file__).parent / "models"
GRANITE = MODELS / "mobius" / "granitemoehybrid_static_unroll_f32.onnx"
TIED = MODELS / "mobius" / "llama_tied_dense_f32.onnx"

SLICES, MATRICES = "unrolled: slices of a stack", "unrolled: a matrix for each expert"
BATCHED = "batched: weights gathered for each token"
DENSE = "dense: every expert on every token, by a batched product"
MASKED, SORTED, OWN = "every one (masked)", "sorted by expert (grouped)", "its own (NonZero)"


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


@pytest.mark.parametrize(
    ("model", "blocks", "form", "experts", "rows"),
    [
        ("genai/gemma4_moe_fp32_cpu_b32", 2, "MoE node", 4, ""),
        ("genai/gpt_oss_int4_cpu_b32", 2, "QMoE node", 4, ""),
        ("genai_old/phimoe_int4_cuda_071", 2, "QMoE node", 16, ""),
        ("genai/llama_tied_fp32_cpu", 0, "", 0, ""),
        ("hf_blocks/mixtral__batched_mm__dynamo18", 1, BATCHED, 4, ""),
        ("hf_blocks/qwen3_moe__eager__ts17", 1, "unrolled: slices by a computed index", 4, OWN),
        ("hf_exporter/gpt_oss__default", 2, SLICES, 4, SORTED),
        ("hf_exporter/mixtral__batched_mm", 2, BATCHED, 4, ""),
        ("mobius/granitemoehybrid_static_unroll_f32", 2, SLICES, 4, MASKED),
        ("mobius/qwen3_moe_dense_experts_f32", 2, MATRICES, 4, MASKED),
        ("mobius/qwen3_moe_dense_ortq4", 2, "unrolled: a quantized matrix for each expert", 4, MASKED),
        ("torch_unroll/dense_bmm_all_experts__dynamo18_opt", 1, DENSE, 4, ""),
        ("torch_unroll/getitem_linear__ts17_nofold", 1, SLICES, 4, MASKED),
        ("torch_unroll/modulelist_linear_rank2__dynamo18_opt", 1, MATRICES, 4, MASKED),
    ],
)
def test_blocks_of_real_models(model, blocks, form, experts, rows):
    found = inspect(load(MODELS / f"{model}.onnx")).blocks
    assert len(found) == blocks
    assert {(b.form, b.experts, b.top_k, b.rows) for b in found} <= {(form, experts, 2, rows)}
    assert [b.layer for b in found] == list(range(blocks))


def test_weights_by_role_and_how_they_are_stored():
    info = inspect(load(MODELS / "genai" / "gpt_oss_int4_cpu_b32.onnx"))
    held = {(h.role, h.stored): (h.kind, h.count, h.elements) for h in info.weights}
    assert held["expert", "4 bits, QMoE"] == ("quantized", 4, 2 * 4 * 3 * 64 * 64)
    assert held["lm_head", "4 bits, MatMulNBits"] == ("quantized", 1, 512 * 64)
    assert held["expert", "FLOAT, biases"][0] == "bias"
    assert held["embedding", "FLOAT"] == ("float", 1, 512 * 64)
    assert sum(h.nbytes for h in info.weights) == info.nbytes


def test_who_wrote_it_and_what_is_in_it():
    info = inspect(load(GRANITE))
    assert (info.producer, info.layers, info.functions) == ("mobius 0.1.0", 2, 1)
    assert info.opsets == {"ai.onnx": 24, "com.microsoft": 1}
    assert info.operators["MatMul"] == 31
    assert info.inputs["input_ids"].startswith("INT64")


def test_a_model_of_nothing():
    info = inspect(parse("main (float[2] x) => (float[2] y) { y = Identity(x) }"))
    assert (info.layers, info.nbytes, info.weights, info.blocks) == (0, 0, (), ())


def test_what_it_prints(capsys):
    assert main(["inspect", str(GRANITE)]) == 0
    out = capsys.readouterr().out
    for words in ("mobius 0.1.0", "2, of which 2 with experts", SLICES, "expert.gate_up", "moe-int4", "100.0%", "none"):
        assert words in out, words


def test_rule_sets_of_which_no_rule_fires_share_a_line(capsys, tmp_path):
    assert main(["apply", str(GRANITE), "-o", str(tmp_path / "o"), "--rules", "experts-int4", "-q"]) == 0
    assert main(["inspect", str(next((tmp_path / "o").glob("*.onnx")))]) == 0
    out = capsys.readouterr().out
    assert re.search(r" experts-int4, .*unstack: no rule would fire ", " ".join([*out.split(), ""]))
    assert re.search(r"^moe-int4 +[0-9]", out, re.MULTILINE)
    assert not re.search(r"^experts-int4 +[0-9]", out, re.MULTILINE)


def test_a_model_that_no_rule_set_changes_has_no_empty_table(capsys, tmp_path):
    ir.save(parse("main (float[2] x) => (float[2] y) { y = Identity(x) }"), tmp_path / "m.onnx")
    assert main(["inspect", str(tmp_path / "m.onnx")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "No rule of these rule sets would fire: dense-int4, " in out and "float experts" not in out


def test_it_speaks_json(capsys):
    assert main(["inspect", str(GRANITE), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["rule_set"] for entry in found["rule_sets"]] == list(rule_sets())
    sizes = {entry["rule_set"]: entry for entry in found["rule_sets"]}
    assert sizes["unstack"]["float_experts"] == 196_608
    assert sizes["experts-int4"]["float_experts"] == 0
    assert sizes["experts-int4"]["bytes_after"] < found["nbytes"]


def test_on_a_large_model_a_few_rule_sets_are_tried_without_being_asked(capsys, monkeypatch):
    monkeypatch.setattr("rewriter.cli.comparison.MOST_NODES", 10)
    assert main(["inspect", str(GRANITE)]) == 0
    out = capsys.readouterr().out
    assert "--sizes tries all" in out and "moe-int4" in out and "k-quant" not in out
    assert main(["inspect", str(GRANITE), "--no-sizes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rule_sets"] == []


def test_a_rule_set_that_cannot_run_says_why(capsys, monkeypatch):
    monkeypatch.setattr("rewriter.ruleset.rule_sets", lambda: {"nowhere": None, "unstack": None})
    assert main(["inspect", str(GRANITE)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^nowhere +- +- +- +-$", out, re.MULTILINE)
    assert re.search(r"^unstack +667 kB +100\.0%", out, re.MULTILINE)
    assert re.search(r"^nowhere cannot be used: unknown rule set 'nowhere'", out, re.MULTILINE)


def test_sizes_that_nobody_wants_are_no_matter_of_nodes(capsys):
    assert main(["inspect", str(GRANITE), "--no-sizes"]) == 0
    assert "--sizes" not in capsys.readouterr().out


def test_a_narrow_terminal_is_told_what_it_does_not_show(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["inspect", str(GRANITE), "--no-sizes"]) == 0
    out = capsys.readouterr().out
    assert "rows of an expert" in out
    assert "left out at 80 columns: nodes" in out


def test_what_reads_a_weight():
    left = rewriter.apply(TIED, "experts-int4", prover=lambda rewrite, run: None).report.left
    readers = {weight.name: weight.readers for weight in left}
    assert readers["model.embed_tokens.weight"] == ("Gather", "Transpose", "MatMul")
    assert readers["model.rotary_emb.cos_cache"] == ("Gather",)


def test_a_role_is_found_behind_any_number_of_readers():
    experts = range(200)
    nodes = "".join(f"g{e} = Gather (W, i{e}) y{e} = MatMul (x, g{e}) " for e in experts)
    indices = ", ".join(f"int64 i{e} = {{{e}}}" for e in experts)
    sums = ", ".join(f"y{e}" for e in experts)
    graph = f"g (float[1,1] x, float[200,1,1] W) => (float[1,1] y) <{indices}> {{ {nodes} y = Sum ({sums}) }}"
    (_, stack) = parse(graph).graph.inputs

    def role_of(node):
        return Role("expert.up") if node.op_type == "MatMul" else Role()

    assert role_of_tensor(Slot(stack, "W", None), role_of).name == "expert.up"


@pytest.mark.parametrize(
    ("model", "weights", "turned", "role"),
    [
        ("mobius/qwen3_moe_dense_experts_f32", ".experts.", True, "expert.gate"),
        ("genai/llama_tied_fp32_cpu", "lm_head.MatMul.weight", True, "embedding"),
        ("mobius/llama_tied_dense_f32", "model.embed_tokens.weight", False, "embedding"),
        ("torch_unroll/gptoss_getitem_bias_interleaved__dynamo18_opt", "gate_up_proj", True, "expert.gate_up"),
        ("genai/gpt_oss_fp32_cpu", "gate_up_proj.weight", False, "expert"),
    ],
)
@pytest.mark.parametrize(
    ("grid", "says"),
    [
        ("mxfp4", "on a grid of mxfp4: 4.25 bits without loss"),
        ("int", "on a grid of 4 bits, blocks of 32, symmetric: 5 bits without loss"),
    ],
)
def test_what_float_weights_were_trained_as_is_said_however_they_are_stored(model, weights, turned, role, grid, says):
    found = load(MODELS / f"{model}.onnx")
    changed = 0
    for name, value in found.graph.initializers.items():
        tensor = value.const_value
        if weights not in name or len(tensor.shape) < 2:
            continue
        *lead, n, k = (int(d) for d in tensor.shape.numpy())
        n, k = (k, n) if turned else (n, k)
        if grid == "mxfp4":
            made = [floats(n, k, MXFP4, dtype=np.float32, seed=e)[0] for e in range(lead[0] if lead else 1)]
        else:
            how = {"symmetric": True, "dtype": np.dtype(np.float32)}
            made = [integers(n, k, 4, 32, seed=e, **how)[0] for e in range(lead[0] if lead else 1)]
        array = np.stack(made).swapaxes(-1, -2).copy() if turned else np.stack(made)
        value.const_value = ir.tensor(array if lead else array[0], name=name)
        changed += 1
    holdings = [h for h in inspect(found).weights if h.kind == "float" and h.role == role]
    assert changed and f"FLOAT, {says}" in {h.stored for h in holdings}, holdings
