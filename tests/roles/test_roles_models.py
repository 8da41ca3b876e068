"""Roles found in real exporters' models: the number of nodes of each role in each layer."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx_ir as ir
import pytest

from rewriter.roles import find_roles

MODELS = Path(__file__).parents[1] / "models"

EDGES = Counter({("embedding", None): 1, ("lm_head", None): 1})
PACKED = {"attention.qkv": 1, "attention.o": 1}
SEPARATE = {"attention.q": 1, "attention.k": 1, "attention.v": 1, "attention.o": 1}
FUSED = {"router": 1, "expert": 1}
MLP = {"mlp.gate": 1, "mlp.up": 1, "mlp.down": 1}
SHARED = {"shared_expert.gate": 1, "shared_expert.up": 1, "shared_expert.down": 1}
UNROLLED = {"router": 1, "expert.gate_up": 4, "expert.down": 4}
UNROLLED_APART = {"router": 1, "expert.gate": 4, "expert.up": 4, "expert.down": 4}
GATHERED = {"router": 1, "expert.gate_up": 2, "expert.down": 2}  # the Gather and the MatMul
BATCHED = {"router": 1, "expert.gate_up": 1, "expert.down": 1}

TWO_LAYERS = [
    (PACKED | FUSED | SHARED, "genai/gemma4_moe_fp32_cpu_b32"),
    (PACKED | GATHERED, "genai/gpt_oss_decomposed_dml_fp32"),
    (
        PACKED | FUSED,
        "genai/gpt_oss_fp16_cuda",
        "genai/gpt_oss_fp32_cpu",
        "genai/gpt_oss_int4_cpu_b32",
        "genai_old/phimoe_int4_cuda_071",
        "hf_exporter/qwen3_moe__ortcuda",
    ),
    (
        PACKED | MLP,
        "genai/llama_tied_fp16_cuda",
        "genai/llama_tied_fp32_cpu",
        "genai/llama_tied_int4_cpu_shared",
        "genai/llama_tied_int4_cpu_shared_kquant",
        "genai/llama_untied_int4_cpu",
    ),
    (SEPARATE | UNROLLED, "hf_exporter/gpt_oss__default", "hf_exporter/qwen3_moe__default"),
    (SEPARATE | GATHERED, "hf_exporter/mixtral__batched_mm"),
    (
        SEPARATE | FUSED | SHARED,
        "mobius/gemma4_fused_moe_head_f32",
        "mobius/gemma4_fused_moe_pre324_malformed_f32",
    ),
    (
        SEPARATE | UNROLLED | SHARED,
        "mobius/gemma4_silu_static_unroll_pr324_f32",
        "mobius/gemma4_static_unroll_ortq4",
        "mobius/gemma4_static_unroll_pr324_f16",
    ),
    (
        SEPARATE | UNROLLED | {"shared_expert.gate_up": 1, "shared_expert.down": 1},
        "mobius/granitemoehybrid_static_unroll_f32",
    ),
    (SEPARATE | MLP, "mobius/llama_tied_dense_f32"),
    (
        SEPARATE | UNROLLED_APART,
        "mobius/mixtral_dense_experts_f32",
        "mobius/qwen3_moe_dense_experts_f32",
        "mobius/qwen3_moe_dense_ortq4",
    ),
    (SEPARATE | FUSED, "mobius/qwen3_moe_qmoe_gptq4_asym"),
]
ONE_BLOCK = [
    (GATHERED, "hf_blocks/gpt_oss__batched_mm__dynamo18", "hf_blocks/mixtral__batched_mm__dynamo18"),
    (GATHERED, "torch_unroll/dynamic_gather_topk__dynamo18_opt"),
    ({"router": 1, "expert.gate_up": 8, "expert.down": 8}, "hf_blocks/qwen3_moe__eager__ts17"),
    (BATCHED, "optimum/qwen3vlmoe_block457__ts17", "torch_unroll/dense_bmm_all_experts__dynamo18_opt"),
    (
        UNROLLED,
        "torch_unroll/bmm_slice_transpose__dynamo18_opt",
        "torch_unroll/getitem_linear__dynamo18_opt",
        "torch_unroll/getitem_linear__dynamo18_raw",
        "torch_unroll/getitem_linear__ts17_nofold",
        "torch_unroll/getitem_linear_onehot__dynamo18_opt",
        "torch_unroll/getitem_matmul_T__dynamo18_opt",
        "torch_unroll/getitem_matmul_T__dynamo18_opt_f16",
        "torch_unroll/getitem_matmul_inmajor__dynamo18_opt",
        "torch_unroll/gptoss_getitem_bias_interleaved__dynamo18_opt",
        "torch_unroll/index_select_squeeze_linear__dynamo18_opt",
        "torch_unroll/slice_squeeze_linear__dynamo18_opt",
        "torch_unroll/slice_squeeze_linear__dynamo18_raw",
        "torch_unroll/split_squeeze_linear__dynamo18_opt",
        "torch_unroll/split_squeeze_linear__ts17_nofold",
    ),
    (
        UNROLLED_APART,
        "torch_unroll/modulelist_linear_rank2__dynamo18_opt",
        "torch_unroll/w1_w2_w3_getitem_linear__dynamo18_opt",
    ),
]


def _layered(*layers: dict[str, int]) -> Counter[tuple[str, int | None]]:
    return Counter({(name, index): count for index, layer in enumerate(layers) for name, count in layer.items()})


EXPECTED = (
    {model: _layered(roles, roles) + EDGES for roles, *ms in TWO_LAYERS for model in ms}
    | {model: _layered(roles) for roles, *models in ONE_BLOCK for model in models}
    | {
        # Layer 0 mixes by a convolution, whose projections have no role.
        "genai/lfm2_moe_fp32_cpu": _layered(FUSED, FUSED | PACKED) + EDGES
    }
)
PRESENT = [model for model in sorted(EXPECTED) if (MODELS / f"{model}.onnx").exists()]


def _load(model: str) -> ir.Model:
    return ir.load(MODELS / f"{model}.onnx")


def _histogram(model: ir.Model) -> Counter[tuple[str, int | None]]:
    return Counter((role.name, role.layer) for role in find_roles(model).values())


def test_models_are_there():
    assert len(EXPECTED) == 49
    assert len(PRESENT) >= 8


@pytest.mark.parametrize("name", PRESENT)
def test_real_model(name):
    assert _histogram(_load(name)) == EXPECTED[name]


@pytest.mark.parametrize("name", PRESENT)
def test_static_experts_are_counted_from_zero(name):
    experts: dict[tuple[str, int | None], list[int]] = {}
    for role in find_roles(_load(name)).values():
        if role.expert is not None:
            experts.setdefault((role.name, role.layer), []).append(role.expert)
    counts = EXPECTED[name]
    static = counts.get(("expert.down", 0)) == 4 and "eager" not in name
    assert bool(experts) == static
    for key, indices in experts.items():
        assert sorted(indices) == list(range(counts[key]))


@pytest.mark.parametrize("name", PRESENT)
def test_names_do_not_matter(name):
    model = _load(name)
    before = list(find_roles(model).values())
    values = {}
    for node in model.graph.all_nodes():
        for value in (*node.inputs, *node.outputs):
            if value is not None:
                values[value] = None
        node.name = f"n{len(values)}"
    for index, value in enumerate(values):
        value.name = f"v{index}"
    assert list(find_roles(model).values()) == before


@pytest.mark.parametrize("name", PRESENT)
def test_nothing_is_changed(name):
    model = _load(name)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    find_roles(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
