"""What weights are called: by the model's own names, each by one that no other weight has."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import rewriter
from rewriter.errors import UsageError
from rewriter.tensors.names import braced

MODELS = Path(__file__).parent / "models"
QWEN = MODELS / "mobius" / "qwen3_moe_dense_experts_f32.onnx"
TIED = MODELS / "mobius" / "gemma4_silu_static_unroll_pr324_f32.onnx"


@pytest.mark.parametrize(
    "model",
    [
        QWEN,
        TIED,
        MODELS / "transformers_4_51" / "qwen3_moe__block__ts17.onnx",  # experts are initializers with numbers for names
        MODELS / "torch_unroll" / "modulelist_linear_rank2__dynamo18_opt.onnx",
        MODELS / "hf_exporter" / "mixtral__batched_mm.onnx",
    ],
    ids=lambda file: file.stem,
)
def test_no_two_weights_have_one_name_and_sources_are_the_models_own(model):
    report = rewriter.explain(model)
    assert max(Counter(weight.name for weight in report.weights).values()) == 1
    stored = {name for graph in rewriter.io.load(model).graphs() for name in graph.initializers}
    found = {source for weight in report.weights for source in weight.sources}
    assert found and found <= stored


def test_what_two_constants_make_is_called_after_both():
    found = {weight.name: weight for weight in rewriter.explain(QWEN).weights}
    both = found["model.layers.1.mlp.experts.2.{gate,up}_proj.weight_t"]
    assert both.sources == tuple(f"model.layers.1.mlp.experts.2.{one}_proj.weight_t" for one in ("gate", "up"))
    assert (both.role, both.layer, both.expert) == ("expert.gate_up", 1, 2)
    assert found["model.layers.1.mlp.experts.2.down_proj.weight_t"].expert == 2


def test_parts_of_one_constant_are_told_apart():
    packed = MODELS / "genai" / "llama_tied_fp32_cpu.onnx"
    rules = {
        "extends": "rtn",
        "quantization": {"overrides": [{"role": "attention.q", "bits": 8}]},
    }
    names = [weight.name for weight in rewriter.explain(packed, rules=rules).weights if "qkv" in weight.name]
    assert any("__rows_" in name or "__columns_" in name for name in names), names
    assert len(set(names)) == len(names)


def test_importance_goes_by_the_models_own_names():
    own = "model.layers.1.mlp.experts.2.{}_proj.weight_t"
    wide, narrow = np.linspace(1, 9, 64), np.linspace(1, 5, 32)
    given = {own.format("gate"): wide, own.format("up"): wide, own.format("down"): narrow}
    seen = {}

    def spy(weight, context):
        seen[context.weight] = context
        return rewriter.quantize.ALGORITHMS["rtn"](weight, context)

    result = rewriter.apply(QWEN, imatrix=given, quantizer=spy, overrides={"parity.local": "none"})
    rewriter.io.to_proto(result.ir_model)
    gated, down = seen[own.format("{gate,up}")], seen[own.format("down")]
    assert np.array_equal(gated.importance, wide) and np.array_equal(down.importance, narrow)
    assert gated.sources == (own.format("gate"), own.format("up"))


def test_importance_that_differs_for_rows_of_one_weight_is_an_error():
    own = "model.layers.0.mlp.experts.0.{}_proj.weight_t"
    given = {own.format("gate"): np.ones(64), own.format("up"): np.full(64, 2.0)}
    with pytest.raises(UsageError, match="differ, but they are one weight"):
        rewriter.apply(QWEN, imatrix=given)


def test_an_embedding_and_an_equal_head_keep_their_names():
    applied = rewriter.explain(TIED)
    names = [weight.name for weight in applied.weights]
    assert names.count("lm_head.weight_t") == 1


@pytest.mark.parametrize(
    ("names", "joined"),
    [
        (["a.gate.w", "a.up.w"], "a.{gate,up}.w"),
        (["a.gate_proj.w", "a.up_proj.w"], "a.{gate,up}_proj.w"),
        (["onnx::MatMul_812", "onnx::MatMul_813"], "onnx::MatMul_{812,813}"),
        (["q", "k", "v"], "{q,k,v}"),
        (["layer.1.w", "layer.11.w"], "layer.{1,11}.w"),
    ],
)
def test_names_are_joined_as_a_shell_would_read_them(names, joined):
    assert braced(names) == joined
