"""fuse-experts: whole blocks in plain operators become one MoE, exactly, or stay and say why."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from block_models import ACTIVATIONS, COMBINES, GIVEN, ROUTERS, STACKED, WEIGHTS, Spelling, block_model
from hypothesis import given
from hypothesis import strategies as st

import rewriter
from rewriter.parity.runtime import OrtRuntime

MODELS = Path(__file__).parents[1] / "models"
FUSE = "fuse-experts"
BOUND = {"float32": 1e-5, "float16": 4e-3}

EXPORTED = {
    "mobius/granitemoehybrid_static_unroll_f32": 2,
    "mobius/gemma4_silu_static_unroll_pr324_f32": 2,
    "mobius/qwen3_moe_dense_experts_f32": 2,
    "hf_exporter/qwen3_moe__default": 2,
    "hf_exporter/gpt_oss__default": 2,
    "hf_exporter/mixtral__batched_mm": 2,
    "hf_blocks/mixtral__batched_mm__dynamo18": 1,
    "hf_blocks/gpt_oss__batched_mm__dynamo18": 1,
    "transformers_4_51/qwen3_moe__block__ts17": 1,
    "transformers_4_51/mixtral__block__dynamo18": 1,
    "torch_unroll/getitem_linear_onehot__dynamo18_opt": 1,
    "torch_unroll/dense_bmm_all_experts__dynamo18_opt": 1,
    "torch_unroll/gptoss_getitem_bias_interleaved__dynamo18_opt": 1,
    "torch_unroll/bmm_slice_transpose__dynamo18_opt": 1,
    "torch_unroll/dynamic_gather_topk__dynamo18_opt": 1,
    "torch_unroll/modulelist_linear_rank2__dynamo18_opt": 1,
    "torch_unroll/getitem_linear__ts17_nofold": 1,
    "torch_unroll/slice_squeeze_linear__dynamo18_raw": 1,
    "torch_unroll/getitem_matmul_T__dynamo18_opt_f16": 1,
}


def feeds(how, seed=3):
    lead = (5,) if how.rank == 2 else (2, 3)
    return {"x": np.random.default_rng(seed).standard_normal((*lead, how.hidden)).astype(how.dtype)}


def relative(expected, actual):
    assert expected.shape == actual.shape
    return float(np.abs(expected.astype(float) - actual).max() / np.abs(expected).max())


def fuse(model, rules=FUSE, **options):
    return rewriter.apply(model, rules, **options)


def fused(how, **options):
    """The fused model, after it was held against the original."""
    model = block_model(how)
    result = fuse(model, **options)
    assert result.report.applied == {FUSE: 1}, result.report.declined
    expected, actual = (OrtRuntime().run(m, feeds(how))["y"] for m in (model, result.model))
    assert relative(expected, actual) < BOUND[how.dtype]
    return result.model


def operators(model):
    return Counter(node.op_type for node in model.graph.node)


def node_of(model):
    (node,) = (node for node in model.graph.node if node.op_type == "MoE")
    return node


def attributes(model):
    return {a.name: onnx.helper.get_attribute_value(a) for a in node_of(model).attribute}


def assert_declines(how, *reasons):
    model = block_model(how)
    before = model.SerializeToString()
    result = fuse(model)
    assert not result.report.applied
    found = [reason for _, reason in result.report.declined]
    assert len(found) == len(reasons), found
    assert all(want in reason for want, reason in zip(reasons, found, strict=True)), found
    assert operators(result.model) == operators(model)
    assert model.SerializeToString() == before


@pytest.mark.parametrize("name", EXPORTED)
def test_exported_blocks_become_one_moe_each(name):
    model = onnx.load(MODELS / f"{name}.onnx")
    result = fuse(model)
    assert result.report.applied == {FUSE: EXPORTED[name]}
    assert operators(result.model)["MoE"] == EXPORTED[name]
    assert not operators(result.model) & Counter({"TopK": 1, "GatherND": 1, "ReduceSum": 1}) - operators(model)
    assert all(proof.runtime == "cpu" and not proof.skipped for proof in result.report.proofs)
    recorded = np.load(MODELS / f"{name}.npz")
    inputs = {key[3:]: recorded[key] for key in recorded if key.startswith("in:")}
    for out, value in OrtRuntime().run(result.model, inputs).items():
        expected = recorded[f"out:{out}"]
        assert relative(expected, value) < (1e-5 if expected.dtype == np.float32 else 2e-3)
    assert not fuse(result.model).report.applied


def test_nothing_is_left_of_a_block():
    model = fused(Spelling(seed="expand"))
    assert operators(model) == {"MatMul": 1, "MoE": 1, "Identity": 1}
    assert {i.name for i in model.graph.initializer} == {"router", *node_of(model).input[2::2]}


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("halves", ["split", "slice", "interleaved", "apart"])
def test_every_combine_and_every_split_of_gate_and_up(combine, halves):
    rank = 2 if combine in STACKED or halves == "split" else 3
    fused(Spelling(combine=combine, halves=halves, bias=halves != "slice", rank=rank))


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("combine", ["mask-sum", "chosen"])
def test_every_router(router, combine):
    model = fused(Spelling(router=router, combine=combine, shared=True), target="cpu@1.31")
    assert attributes(model)["normalize_routing_weights"] == 1
    extra = {
        "sigmoid-normalised": {"Neg": 2, "Softplus": 1},
        "sigmoid-late": {"Neg": 2, "Softplus": 1},
        "scaled": {"Mul": 1},
        "softmax-topk": {"Softmax": 1, "TopK": 1, "ReduceSum": 1, "Mul": 1},
    }.get(router, {})
    assert operators(model) == {"MatMul": 2, "MoE": 1, "Add": 1, "Identity": 1, **extra}


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_way_to_a_weight(weights):
    halves = "apart" if weights == "gather-rank1" else "split"
    fused(Spelling(weights=weights, halves=halves, bias=True, seed="constant-of-shape"))


@pytest.mark.parametrize("combine", ["mask-sum", "dense", "chosen"])
def test_float16(combine):
    fused(Spelling(combine=combine, dtype="float16"))


def test_another_name_of_the_input_may_be_read_elsewhere():
    model = fused(Spelling(alias=True))
    assert operators(model) == {"Identity": 2, "MatMul": 1, "MoE": 1}


def test_a_stack_that_is_stored_as_the_operator_reads_it_is_the_same_tensor():
    model = fused(Spelling(weights="gather", activation="relu"))
    assert node_of(model).input[2] == "stack_gate" and node_of(model).input[4] == "stack_down"


def test_weights_are_stacked_in_order_and_rows_in_turn():
    how = Spelling(weights="own", halves="apart", bias=True)
    model = fused(how)
    arrays = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    source = {i.name: onnx.numpy_helper.to_array(i) for i in block_model(how).graph.initializer}
    fc1, bias, fc2 = (arrays[node_of(model).input[i]] for i in (2, 3, 4))
    for expert in range(4):
        np.testing.assert_array_equal(fc1[expert, 0::2], source[f"gate_{expert}"].T)
        np.testing.assert_array_equal(fc1[expert, 1::2], source[f"up_{expert}"].T)
        np.testing.assert_array_equal(fc2[expert], source[f"down_{expert}"].T)
    np.testing.assert_array_equal(bias[:, 1::2], source["all_up_bias"])


DECLINED = {
    "missing": "expert 1 of 4 is missing",
    "doubled": "expert 1 is mixed in twice",
    "other-share": "expert 0 is mixed in twice",
    "other-activation": "expert 2 has another activation than expert 0",
    "other-input": "expert 2 reads another input than expert 0",
    "other-topk": "the router: a weight is masked by the choice of another slot or router",
    "smallest": "the router: TopK takes the smallest scores",
    "softmax-axis": "the router's weights are no softmax and no normalised sigmoid of its logits",
    "raw-logits": "the router's weights are no softmax and no normalised sigmoid of its logits",
    "erf-gelu": "expert 0: MoE has no activation Gelu(erf)(linear) * linear2",
    "tanh": "expert 0: MoE has no activation tanh(linear) * linear2",
    "wide-seed": "what a sum of experts is added to is not as large as it",
    "inner-read": "inside of the block is also read by Relu",
    "inner-output": "inside of the block is a graph output",
}


@pytest.mark.parametrize("broken", DECLINED)
def test_one_broken_thing_declines_and_says_what(broken):
    assert_declines(Spelling(broken=broken), DECLINED[broken])


def test_further_near_misses_decline():
    for limit in ("uneven-limit", "negative-limit"):
        assert_declines(Spelling(broken=limit, activation="clamped"), "MoE has no activation")
    assert_declines(
        Spelling(broken="other-cubic", activation="gelu-pow"), "MoE has no activation 0.5 * linear * add(tanh("
    )
    assert_declines(Spelling(broken="missing-slot", combine="slots"), "expert 1 is mixed in for 1 of 2 slots")
    assert_declines(Spelling(broken="missing-slot", combine="terms-per-slot"), "expert 1 is mixed in for 1 of 2 slots")
    assert_declines(Spelling(broken="crossed-slots", combine="slots"), "choice of another slot or router")
    assert_declines(Spelling(broken="other-topk", combine="chosen"), "not the output of an expert of that router")
    reasons = ("Mod does not belong to an expert", "how Mod uses its choice is not understood")
    assert_declines(Spelling(broken="other-choice", combine="chosen-einsum"), *reasons)
    for combine, operator in (("joined-matmul", "MatMul"), ("joined-einsum", "Einsum"), ("joined-sum", "Mul")):
        features = Spelling(combine=combine, broken="features", experts=8)
        assert_declines(features, f"how {operator} uses its choice is not understood")
    for broken, reason in (
        ("missing-slot", "slot 1 of 2 is missing"),
        ("doubled", "slot 0 of 2 is missing"),
        ("crossed-slots", "how Mul uses its choice is not understood"),
    ):
        assert_declines(Spelling(combine="slot-loop", broken=broken), reason)


@pytest.mark.parametrize("router", ["table", "scaled", "biased", "late", "float32"])
@pytest.mark.parametrize("combine", ["mask-sum", "slots", "chosen", "joined-gathered", "slot-loop"])
def test_what_half_precision_would_round_is_given_as_weights(router, combine):
    """Logits in float32, or factors, of a block in float16: the choice stays as it is, and the weights are given."""
    model = fused(Spelling(router=router, combine=combine, dtype="float16"))
    assert operators(model)["TopK"] == operators(model)["Log"] == operators(model)["ReduceMax"] == 1


@pytest.mark.parametrize("broken", ["swapped", "other-weight", "large-epsilon"])
def test_what_looks_wrong_and_is_exact_fuses(broken):
    fused(Spelling(broken=broken))


def test_weights_that_would_stay_decline():
    how = Spelling(weights="own")
    model = block_model(how)
    model.graph.node.append(onnx.helper.make_node("ReduceMax", ["down_2"], ["largest"]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("largest", 1, None))
    ((_, reason),) = fuse(model).report.declined
    assert reason == "the weight 'down_2' would stay in the model: ReduceMax also reads it"


def test_one_weight_for_gate_and_up_declines():
    model = block_model(Spelling(weights="own", halves="apart"))
    for node in model.graph.node:
        node.input[:] = [name.replace("up_", "gate_") for name in node.input]
    ((_, reason),) = fuse(model).report.declined
    assert reason == "two of gate, up and down are one weight, which fc1 would hold once more"


def test_a_caller_may_override_a_weight():
    model = block_model(Spelling(weights="own"))
    (down,) = (i for i in model.graph.initializer if i.name == "down_2")
    model.graph.input.append(onnx.helper.make_tensor_value_info("down_2", 1, list(down.dims)))
    ((_, reason),) = fuse(model).report.declined
    assert reason.startswith("expert 2: MatMul does not belong to an expert")


def test_targets():
    model = block_model(Spelling())
    assert fuse(model, target="cuda:sm80@1.31").report.applied == {FUSE: 1}
    for target, reason in (("dml", "has no MoE"), ("cuda@1.24", "its SwiGLU is fixed")):
        ((_, found),) = fuse(model, target=target).report.declined
        assert reason in found


def test_two_blocks_in_a_subgraph():
    inner = block_model(Spelling())
    then, other = (onnx.compose.add_prefix_graph(inner.graph, prefix) for prefix in ("then_", "else_"))
    outer = [then.input[0].name]
    for graph in (then, other):
        del graph.input[:]
    for node in other.node:
        for index, name in enumerate(node.input):
            node.input[index] = outer[0] if name == "else_x" else name
    branch = onnx.helper.make_node("If", ["flag"], ["y"], then_branch=then, else_branch=other)
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [branch], "g", [value("flag", 9, []), value(outer[0], 1, ["T", 8])], [value("y", 1, ["T", 8])]
    )
    model = onnx.helper.make_model(graph, opset_imports=inner.opset_import, ir_version=10)
    result = fuse(model)
    assert result.report.applied == {FUSE: 2}
    for flag in (True, False):
        inputs = {"flag": np.array(flag), outer[0]: feeds(Spelling())["x"]}
        assert relative(OrtRuntime().run(model, inputs)["y"], OrtRuntime().run(result.model, inputs)["y"]) < 1e-5


def test_names_do_not_matter():
    how = Spelling(combine="slots", bias=True)
    model = block_model(how)
    for node in model.graph.node:
        node.name = ""
    kept = {"x", "y", ""}
    names = {name: f"t{i}" for i, name in enumerate(dict.fromkeys(n for node in model.graph.node for n in node.output))}
    names |= {init.name: f"w{i}" for i, init in enumerate(model.graph.initializer)}
    for node in model.graph.node:
        node.input[:] = [n if n in kept else names[n] for n in node.input]
        node.output[:] = [n if n in kept else names[n] for n in node.output]
    for init in model.graph.initializer:
        init.name = names[init.name]
    assert fuse(model).report.applied == {FUSE: 1}


BROKEN = ("", *DECLINED, "missing-slot", "crossed-slots", "other-weight", "swapped", "other-choice")

spellings = st.builds(
    Spelling,
    router=st.sampled_from((*ROUTERS, *GIVEN)),
    activation=st.sampled_from(ACTIVATIONS),
    weights=st.sampled_from([w for w in WEIGHTS if w != "gather-rank1"]),
    combine=st.sampled_from(COMBINES),
    halves=st.sampled_from(["split", "slice", "interleaved", "apart"]),
    bias=st.booleans(),
    seed=st.sampled_from(["", "expand", "constant-of-shape"]),
    rank=st.sampled_from([2, 3]),
    experts=st.integers(2, 6),
    k=st.integers(1, 2),
    hidden=st.sampled_from([4, 8]),
    inter=st.sampled_from([4, 6]),
    dtype=st.sampled_from(["float32", "float16"]),
    shared=st.booleans(),
    alias=st.booleans(),
    broken=st.sampled_from(BROKEN),
    random=st.integers(0, 3),
)


@given(spellings)
def test_any_block_fuses_exactly_or_declines(how):
    if how.combine in STACKED:
        how = replace(how, rank=2, weights="gather", broken="" if how.broken.startswith("inner") else how.broken)
    try:
        model = block_model(how)
        inputs = feeds(how)
        expected = OrtRuntime().run(model, inputs)["y"]
    except (rewriter.errors.TargetError, ValueError, IndexError):
        return
    result = fuse(model)
    if not result.report.applied:
        assert how.broken or how.dtype == "float16" or how.k == 1, result.report.declined
        return
    assert relative(expected, OrtRuntime().run(result.model, inputs)["y"]) < 5 * BOUND[how.dtype]


def test_moe_int4_fuses_what_qmoe_runs(tmp_path):
    model = onnx.load(MODELS / "mobius/qwen3_moe_dense_experts_f32.onnx")
    result = fuse(model, "moe-int4", target="cpu")
    assert result.report.applied["fuse-experts"] == result.report.applied["moe-to-qmoe"] == 2
    assert operators(result.model)["QMoE"] == 2
    result.save(tmp_path / "out")
    experts = {(w.role, w.layer, w.expert) for w in result.report.weights if w.role.startswith("expert")}
    assert experts == {
        (f"expert.{name}", layer, expert) for name in ("gate_up", "down") for layer in (0, 1) for expert in range(4)
    }


def test_moe_int4_and_int8_fall_back_to_one_matmul_nbits_for_each_matrix():
    geglu = Spelling(activation="geglu", weights="gather", hidden=32, inter=32)
    for how, rules, reason in (
        (geglu, "moe-int4", "QMoE on target cpu@1.31: activation 'geglu' has no kernel"),
        (replace(geglu, activation="swiglu"), "moe-int8", "rounds activations to 8 bits at 8 bits in blocks of 32"),
    ):
        result = fuse(block_model(how), rules, target="cpu@1.31")
        assert operators(result.model)["MatMulNBits"] == 8 and not operators(result.model)["MatMul"] > 1
        assert reason in next(r for (rule, r) in result.report.declined if rule == FUSE)


def test_moe_int8_fuses_where_rounded_activations_are_accepted():
    swiglu = Spelling(activation="swiglu", weights="gather", hidden=32, inter=32)
    result = fuse(block_model(swiglu), "moe-int8", target="cpu@1.31", overrides={"rounded_activations": True})
    assert operators(result.model)["QMoE"] == 1 and not operators(result.model)["MatMulNBits"]
    assert any("rounds activations to 8 bits" in proof.because for proof in result.report.proofs)


def test_experts_that_the_plan_gives_different_widths_stay_apart():
    plan = {"quantization.overrides": [{"role": "expert.down", "bits": 8}]}
    how = Spelling(weights="own", hidden=32, inter=32)
    result = fuse(block_model(how), "moe-int4", target="cpu", overrides=plan)
    assert operators(result.model)["MatMulNBits"] == 8
    assert "runs projections of different bits" in next(r for (rule, r) in result.report.declined if rule == FUSE)
