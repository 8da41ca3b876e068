"""moe-fuse-fc3: gate and linear half in one fc1, so that the CPU provider runs what it refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from moe_models import (
    NORMALISE,
    SWIGLU,
    assert_declines,
    attributes_of,
    feeds,
    halves_apart,
    initializers_of,
    moe_model,
    nodes_of,
    ort,
    reference,
    relative,
    rewrite,
    rule_set,
)

from rewriter.parity.runtime import OrtRuntime

MODELS = Path(__file__).parents[1] / "models"
FUSE = rule_set(["moe-fuse-fc3"])


@pytest.mark.parametrize("bias", ["none", "random"])
@pytest.mark.parametrize("attributes", [{"activation_type": "silu"}, SWIGLU], ids=["silu", "swiglu"])
def test_fused_form_runs_and_agrees(attributes, bias):
    model = moe_model(attributes | {"k": 2, "normalize_routing_weights": 1}, fc3=True, bias=bias)
    result = rewrite(model, FUSE)
    assert result.report.applied == {"moe-fuse-fc3": 1}
    (proof,) = result.report.proofs
    assert proof.runtime == "reference" and "fc3 beside" in proof.because and proof.because.endswith("cpu runs it")
    (node,) = nodes_of(result.model, "MoE")
    own = attributes_of(node)
    assert (own["activation_type"], own["swiglu_fusion"]) == (b"swiglu", 1)
    assert relative(ort(result.model, feeds()), reference(model, feeds())) < 1e-5
    gate, linear = halves_apart(initializers_of(result.model)[node.input[2]])
    np.testing.assert_array_equal(gate, initializers_of(model)["layer0.fc1"])
    np.testing.assert_array_equal(linear, initializers_of(model)["layer0.fc3"])
    assert not rewrite(result.model, FUSE).report.applied


@pytest.mark.parametrize("missing", [3, 7])
def test_a_missing_bias_is_zero(missing):
    model = moe_model({"activation_type": "silu", "k": 2}, fc3=True)
    del model.graph.initializer[missing - 2 :][:0]
    model.graph.node[0].input[missing] = ""
    result = rewrite(model, FUSE)
    assert relative(ort(result.model, feeds()), reference(model, feeds())) < 1e-5


def test_the_float_normal_form_computes_what_the_exporters_default_form_does(tmp_path):
    result = rewrite(onnx.load(MODELS / "hf_exporter/qwen3_moe__ortcuda.onnx"), rule_set(NORMALISE), "cpu")
    assert result.report.applied == {"moe-fuse-fc3": 2}
    recorded = np.load(MODELS / "hf_exporter/qwen3_moe__default.npz")
    inputs = {key[3:]: recorded[key] for key in recorded if key.startswith("in:")}
    logits = OrtRuntime().run(result.save(tmp_path / "out"), inputs)["logits"]
    assert relative(logits, recorded["out:logits"]) < 1e-5


def silu(**more):
    return moe_model({"activation_type": "silu", "k": 2} | more, fc3=True)


def test_declines():
    relu = moe_model({"activation_type": "relu", "k": 2}, fc3=True)
    assert_declines(relu, FUSE, "'relu' gated by fc3 has no fused form; silu and swiglu have")
    assert_declines(silu(activation_alpha=1.5), FUSE, "silu gated by fc3 with alpha, beta or a limit")
    read = silu()
    read.graph.node.append(onnx.helper.make_node("ReduceSum", ["layer0.fc3"], ["total"]))
    read.graph.output.append(onnx.helper.make_tensor_value_info("total", 1, [1, 1, 1]))
    assert_declines(read, FUSE, "the float weight fc3 would stay in the model: ReduceSum also reads it")
    given = silu()
    given.graph.input.append(onnx.helper.make_tensor_value_info("layer0.fc3_bias", 1, [8, 64]))
    assert_declines(given, FUSE, "fc3_bias is not constant")
