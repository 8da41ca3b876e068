"""fuse-experts of quantized experts: MatMulNBits experts become one QMoE with the same codes, or stay and say why."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from block_models import Spelling, block_model

import rewriter
from rewriter.operators import matmul_nbits, qmoe
from rewriter.parity.runtime import OrtRuntime
from rewriter.quantize.types import QuantizedShape

MODELS = Path(__file__).parents[1] / "models"
FUSE = "fuse-experts"
RULES = {"description": "A test.", "phases": [{"name": "fuse", "rules": [FUSE]}]}
BLOCK = {"hidden": 32, "inter": 32, "weights": "own"}


def quantized(how, *, bits=4, block_size=16, symmetric=True, exclude=(), more=()):
    """The block with one MatMulNBits for each matrix; the router stays float."""
    plan = {
        "default": {"bits": bits, "block_size": block_size, "symmetric": symmetric, "algorithm": "rtn"},
        "exclude": [{"role": "router"}, *({"weights": name} for name in exclude)],
    }
    if more:
        plan["overrides"] = [{"weights": name, **spec} for name, spec in more]
    rules = ["matmul-to-matmul-nbits", "gemm-to-matmul-nbits"]
    phases = [{"name": "unstack", "rules": ["unstack"]}, {"name": "quantize", "rules": rules}]
    rule_set = {"description": "A test.", "phases": phases, "quantization": plan}
    return rewriter.apply(block_model(how), rule_set).model


def fuse(model, **options):
    return rewriter.apply(model, RULES, **options)


def operators(model):
    return Counter(node.op_type for node in model.graph.node)


def arrays_of(model):
    return {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}


def relative(expected, actual):
    return float(np.abs(expected.astype(float) - actual).max() / np.abs(expected).max())


def agree(model, other, hidden=32):
    x = {"x": np.random.default_rng(5).standard_normal((5, hidden)).astype(np.float32)}
    return relative(OrtRuntime().run(model, x)["y"], OrtRuntime().run(other, x)["y"])


def assert_declines(model, reason, **options):
    result = fuse(model, **options)
    assert not result.report.applied
    ((_, found),) = result.report.declined
    assert reason in found, found
    assert operators(result.model) == operators(model)


def test_exported_experts_keep_their_codes_byte_for_byte():
    model = onnx.load(MODELS / "mobius/qwen3_moe_dense_ortq4.onnx")
    result = fuse(model)
    assert result.report.applied == {FUSE: 2}
    recorded = np.load(MODELS / "mobius/qwen3_moe_dense_ortq4.npz")
    inputs = {key[3:]: recorded[key] for key in recorded if key.startswith("in:")}
    for out, value in OrtRuntime().run(result.model, inputs).items():
        assert relative(recorded[f"out:{out}"], value) < 1e-5
    before, after = arrays_of(model), arrays_of(result.model)
    for layer, node in enumerate(n for n in result.model.graph.node if n.op_type == "QMoE"):
        fc1, fc1_scales, _, fc2, fc2_scales = (after.get(name) for name in node.input[2:7])
        for expert in range(4):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}"
            for offset, name in enumerate(("gate_proj", "up_proj")):
                codes, scales = (before[f"{prefix}.{name}.weight_t_{suffix}"] for suffix in ("Q4", "scales"))
                np.testing.assert_array_equal(fc1[expert, offset::2], codes.reshape(32, -1))
                np.testing.assert_array_equal(fc1_scales[expert, offset::2], scales)
            np.testing.assert_array_equal(fc2[expert], before[f"{prefix}.down_proj.weight_t_Q4"].reshape(64, -1))
            np.testing.assert_array_equal(fc2_scales[expert], before[f"{prefix}.down_proj.weight_t_scales"])


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_widths_zero_points_and_biases(bits, symmetric, bias):
    model = quantized(Spelling(**BLOCK, bias=bias, halves="apart"), bits=bits, symmetric=symmetric)
    result = fuse(model)
    assert result.report.applied == {FUSE: 1}
    assert operators(result.model) == {"MatMul": 1, "QMoE": 1, "Identity": 1}
    assert agree(model, result.model) < 1e-5


@pytest.mark.parametrize("router", ["topk-softmax", "softmax-topk", "sigmoid-normalised", "scaled", "table"])
def test_routers(router):
    model = quantized(Spelling(**BLOCK, router=router))
    result = fuse(model)
    assert result.report.applied == {FUSE: 1}
    assert agree(model, result.model) < 1e-5
    assert operators(result.model)["Softmax"] == (router == "softmax-topk")


@pytest.mark.parametrize("combine", ["slots", "scatter", "where"])
def test_combines_and_activations(combine):
    for activation in ("clamped", "relu", "silu"):
        model = quantized(Spelling(**BLOCK, combine=combine, activation=activation))
        result = fuse(model)
        assert result.report.applied == {FUSE: 1}
        assert agree(model, result.model) < 1e-5


def test_a_factor_for_each_expert_goes_into_the_scales():
    model = quantized(Spelling(**BLOCK, router="table", bias=True), symmetric=False)
    plain = fuse(quantized(Spelling(**BLOCK, bias=True), symmetric=False)).model
    result = fuse(model).model
    first, second = (next(n for n in m.graph.node if n.op_type == "QMoE") for m in (plain, result))
    factors = np.linspace(0.5, 1.5, 4, dtype=np.float32)
    for slot, shape in ((6, (4, 1, 1)), (7, (4, 1))):
        scaled = arrays_of(plain)[first.input[slot]] * factors.reshape(shape)
        np.testing.assert_array_equal(arrays_of(result)[second.input[slot]], scaled)
    np.testing.assert_array_equal(arrays_of(plain)[first.input[5]], arrays_of(result)[second.input[5]])


def selected_apart():
    """Selection by sigmoid plus a bias, mixing by the sigmoid: what DeepSeek's and LFM2's routers do."""
    model = block_model(Spelling(**BLOCK, router="sigmoid-normalised"))
    (top,) = (n for n in model.graph.node if n.op_type == "TopK")
    scores, values = top.input[0], top.output[0]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0.3, -0.2, 0, 0.1], np.float32), "shift"))
    top.input[0], top.output[0] = "shifted", "unused"
    at = list(model.graph.node).index(top)
    model.graph.node.insert(at, onnx.helper.make_node("Add", [scores, "shift"], ["shifted"]))
    model.graph.node.insert(at + 2, onnx.helper.make_node("GatherElements", [scores, top.output[1]], [values], axis=-1))
    return model


def test_selection_and_mixing_apart_become_router_weights():
    rule_set = {
        "description": "A test.",
        "phases": [{"name": "quantize", "rules": ["matmul-to-matmul-nbits"]}],
        "quantization": {"default": {"bits": 4, "block_size": 16}, "exclude": [{"weights": "router"}]},
    }
    floats = selected_apart()
    model = rewriter.apply(floats, rule_set).model
    result = fuse(model)
    assert result.report.applied == {FUSE: 1}
    (node,) = (n for n in result.model.graph.node if n.op_type == "QMoE")
    assert node.input[1] == "shifted" and node.input[14]
    assert agree(model, result.model) < 1e-5


def test_declines():
    own = Spelling(**BLOCK)
    assert_declines(quantized(own, bits=8), "rounds activations to 8 bits at 8 bits in blocks of 16")
    assert_declines(quantized(own), "target webgpu", target="webgpu@1.31")
    assert_declines(quantized(own, exclude=["both_2"]), "gate is float in some experts and quantized in others")
    assert_declines(quantized(own, more=[("both_2", {"bits": 2})]), "gate of expert 2 is quantized otherwise")
    assert_declines(quantized(own, more=[("down_*", {"bits": 2})]), "one width and one block size for all projections")
    assert_declines(quantized(own, more=[("down_3", {"symmetric": False})]), "zero points of down")
    apart = quantized(Spelling(**BLOCK, halves="apart"), more=[("up_*", {"block_size": 32})])
    assert_declines(apart, "gate and up are quantized in different ways")
    assert_declines(quantized(own, exclude=["both_*"]), "gate is float in some experts and quantized in others")
    odd = quantized(Spelling(weights="own", hidden=24, inter=32))
    assert_declines(odd, "K = 24 of gate is not divisible by the block size 16")


def test_rounded_activations_may_be_accepted():
    """Then the codes are fused as any others, proved by the reference on the bytes that are written."""
    model = quantized(Spelling(**BLOCK), bits=8)
    result = fuse(model, overrides={"rounded_activations": True})
    assert result.report.applied == {FUSE: 1}
    (proof,) = result.report.proofs
    assert proof.runtime == "reference" and "rounds activations to 8 bits" in proof.because
    assert 1e-4 < agree(model, result.model) < 5e-2  # what the runtime gives: the cost that was accepted


@pytest.mark.parametrize("broken", ["missing", "doubled", "other-input", "other-activation", "tanh", "inner-read"])
def test_what_is_no_whole_block_declines(broken):
    model = quantized(Spelling(**BLOCK, broken=broken))
    result = fuse(model)
    assert not result.report.applied and result.report.declined


def test_the_layout_is_the_operators():
    how = Spelling(**BLOCK, activation="relu")
    model = quantized(how, symmetric=False)
    result = fuse(model).model
    (node,) = (n for n in result.graph.node if n.op_type == "QMoE")
    arrays, before = arrays_of(result), arrays_of(model)
    codes, scales, zeros = (arrays[node.input[i]] for i in (2, 3, 11))
    for expert, old in enumerate(n for n in model.graph.node if n.op_type == "MatMulNBits" and "gate" in n.input[1]):
        shape = QuantizedShape(32, 32, 4, 16, symmetric=False)
        expected = matmul_nbits.RAW.require(shape).unpack([before[name] for name in old.input[1:4]])
        found = qmoe.RAW.require(shape).unpack([codes[expert], scales[expert], zeros[expert]])
        np.testing.assert_array_equal(expected.dequantize(), found.dequantize())


def test_a_rule_set_that_names_the_former_rule_still_works():
    model = quantized(Spelling(**BLOCK))
    former = {**RULES, "phases": [{"name": "fuse", "rules": ["fuse-quantized-experts"]}]}
    assert rewriter.apply(model, former).report.applied == {"fuse-quantized-experts": 1}
    assert not rewriter.apply(block_model(Spelling(**BLOCK)), former).report.applied


def test_a_fault_is_declined_once():
    model = quantized(Spelling(**BLOCK, broken="missing"))
    declined = rewriter.apply(model, "moe-int4").report.declined
    assert [reason for _, reason in declined if "is missing" in reason] == ["expert 1 of 4 is missing"]


def levelled(*levels):
    """A block whose MatMulNBits of experts have these accuracy levels, in turn."""
    model = quantized(Spelling(**BLOCK))
    nodes = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    for index, node in enumerate(nodes):
        node.attribute.append(onnx.helper.make_attribute("accuracy_level", levels[index % len(levels)]))
    return model


def level_of(result):
    (node,) = [node for node in result.ir_model.graph if node.op_type == "QMoE"]
    return qmoe.quantized_of(node).accuracy_level


@pytest.mark.parametrize("level", [1, 4])
def test_an_accuracy_level_is_carried(level):
    result = fuse(levelled(level), target="cpu@1.32")
    assert result.report.applied == {FUSE: 1} and level_of(result) == level


@pytest.mark.parametrize(
    ("levels", "target", "why"), [((4,), "cpu@1.30", "target cpu@1.30 has none"), ((4, 1), "cpu@1.32", "differ")]
)
def test_an_accuracy_level_that_is_dropped_is_named(levels, target, why):
    with pytest.warns(rewriter.errors.RewriterWarning, match=f"without its accuracy_level: .*{why}"):
        assert level_of(fuse(levelled(*levels), target=target)) == 0


def with_float32_routing(model):
    """Half-precision experts whose router computes in float32, weights included."""
    nodes = list(model.graph.node)
    linear, divided = (next(n for n in nodes if n.op_type == op) for op in ("MatMul", "Div"))
    (router,) = (i for i in model.graph.initializer if i.name == linear.input[1])
    router.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(router).astype(np.float32), router.name))
    narrow, divided.output[0] = divided.output[0], "wide"
    nodes.insert(nodes.index(divided) + 1, onnx.helper.make_node("Cast", ["wide"], [narrow], to=10))
    nodes.insert(nodes.index(linear), onnx.helper.make_node("Cast", [linear.input[0]], ["x_wide"], to=1))
    linear.input[0] = "x_wide"
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)
    return model


@pytest.mark.parametrize("symmetric", [True, False])
def test_float32_routing_beside_quantized_halves_gives_its_weights(symmetric):
    model = with_float32_routing(quantized(Spelling(dtype="float16", **BLOCK), symmetric=symmetric))
    result = fuse(model)
    assert result.report.applied == {FUSE: 1}, result.report.declined
    assert operators(result.model)["QMoE"] == operators(result.model)["TopK"] == 1
    x = {"x": np.random.default_rng(5).standard_normal((5, 32)).astype(np.float16)}
    assert relative(OrtRuntime().run(model, x)["y"], OrtRuntime().run(result.model, x)["y"]) < 2e-3
