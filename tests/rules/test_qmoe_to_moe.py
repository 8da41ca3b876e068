"""qmoe-to-moe: dequantized experts, and the way back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from moe_models import (
    SWIGLU,
    attributes_of,
    dequantized,
    feeds,
    initializers_of,
    moe_model,
    nodes_of,
    ort,
    reference,
    relative,
    rewrite,
    rule_set,
    untouched,
)

MODELS = Path(__file__).parents[1] / "models"
INTERLEAVED = SWIGLU | {"swiglu_fusion": 1, "k": 2}
BACK = rule_set(["qmoe-to-moe"])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("normalize", [0, 1])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_are_what_the_bytes_say(*, bits, normalize, symmetric):
    model = moe_model(INTERLEAVED | {"normalize_routing_weights": normalize})
    quantized = rewrite(model, rule_set(["moe-to-qmoe"], bits=bits, symmetric=symmetric)).model
    result = rewrite(quantized, BACK)
    assert result.report.applied == {"qmoe-to-moe": 1} and not nodes_of(result.model, "Softmax")
    (node,) = nodes_of(result.model, "MoE")
    (source,) = nodes_of(quantized, "QMoE")
    fc1, fc2, _ = dequantized(quantized, source)
    np.testing.assert_array_equal(initializers_of(result.model)[node.input[2]], fc1)
    np.testing.assert_array_equal(initializers_of(result.model)[node.input[4]], fc2)
    kept = {k: v for k, v in attributes_of(source).items() if k in attributes_of(nodes_of(model, "MoE")[0])}
    assert attributes_of(node) == kept
    assert relative(ort(result.model, feeds()), reference(quantized, feeds())) < 1e-5


def test_requantized_at_other_bits_in_one_run():
    quantized = rewrite(
        moe_model(INTERLEAVED | {"normalize_routing_weights": 1}), rule_set(["moe-to-qmoe"], bits=8)
    ).model
    result = rewrite(quantized, rule_set(["qmoe-to-moe"], ["moe-to-qmoe"], bits=4))
    assert result.report.applied == {"qmoe-to-moe": 1, "moe-to-qmoe": 1}
    (node,) = nodes_of(result.model, "QMoE")
    assert attributes_of(node)["expert_weight_bits"] == 4
    assert relative(ort(result.model, feeds()), ort(quantized, feeds())) < 0.3


def test_mobius_asymmetric_model_runs_on_the_cpu_in_float():
    model = onnx.load(MODELS / "mobius/qwen3_moe_qmoe_gptq4_asym.onnx")
    result = rewrite(model, rule_set(["qmoe-to-moe"], ["swiglu-interleave"], ["moe-to-qmoe"], bits=8), "cpu")
    assert result.report.applied == {"qmoe-to-moe": 2, "swiglu-interleave": 2, "moe-to-qmoe": 2}


def own_weights(model):
    (node,) = nodes_of(model, "QMoE")
    node.input[14] = "own"
    model.graph.input.append(onnx.helper.make_tensor_value_info("own", 1, ["T", 8]))


def other_axis(model):
    nodes_of(model, "Softmax")[0].attribute[0].i = 0


def other_type(model):
    nodes_of(model, "QMoE")[0].attribute.append(onnx.helper.make_attribute("quant_type", "fp8"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (own_weights, "router_weights are not Softmax(router_probs)"),
        (other_axis, "a Softmax over another axis"),
        (other_type, "quant_type 'fp8'"),
    ],
)
def test_declines(change, reason):
    model = moe_model(INTERLEAVED | {"normalize_routing_weights": 0})
    quantized = rewrite(model, rule_set(["moe-to-qmoe"], bits=4), "cpu@1.31").model
    change(quantized)
    result = rewrite(quantized, BACK)
    assert [reason in d.reason for d in result.report.declines] == [True]
    assert result.model.graph.SerializeToString(deterministic=True) == untouched(quantized)


@pytest.mark.parametrize(
    ("normalize", "target", "reason"),
    [
        (0, "cpu@1.31", "MoE on target cpu@1.31: normalize_routing_weights=0 is not heeded in float"),
        (1, "cpu@1.31", ""),
        (0, "cuda@1.31", ""),
    ],
)
def test_weights_that_the_target_would_not_take_as_they_are(normalize, target, reason):
    model = moe_model(INTERLEAVED | {"normalize_routing_weights": normalize}, bias="none")
    quantized = rewrite(model, rule_set(["moe-to-qmoe"], bits=4), "cpu@1.31").model
    del nodes_of(quantized, "QMoE")[0].input[7:]  # as exporters write it, without router_weights
    result = rewrite(quantized, BACK, target)
    assert result.report.applied == ({} if reason else {"qmoe-to-moe": 1})
    assert [d.reason for d in result.report.declines] == ([reason] if reason else [])
