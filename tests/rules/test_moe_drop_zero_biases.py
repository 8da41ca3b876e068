"""moe-drop-zero-biases: biases that add nothing."""

from __future__ import annotations

import numpy as np
import onnx
from moe_models import SWIGLU, feeds, moe_model, nodes_of, ort, rewrite, rule_set, tensor

RULES = rule_set(["moe-drop-zero-biases"])
INTERLEAVED = SWIGLU | {"swiglu_fusion": 1, "k": 2, "normalize_routing_weights": 1}


def test_zero_biases_are_dropped():
    model = moe_model(INTERLEAVED, bias="zero")
    result = rewrite(model, RULES)
    (node,) = nodes_of(result.model, "MoE")
    assert list(node.input) == ["x", "router", "layer0.fc1", "", "layer0.fc2"] and node.name == "moe0"
    assert len(result.model.graph.initializer) == 2
    np.testing.assert_array_equal(ort(result.model, feeds()), ort(model, feeds()))
    assert not rewrite(result.model, RULES).report.applied


def test_a_bias_with_one_other_element_stays():
    model = moe_model(INTERLEAVED, bias="zero")
    bias = np.zeros((8, 64), np.float32)
    bias[7, 63] = 1e-30
    next(i for i in model.graph.initializer if i.name == "layer0.fc2_bias").CopyFrom(tensor(bias, "layer0.fc2_bias"))
    (node,) = nodes_of(rewrite(model, RULES).model, "MoE")
    assert list(node.input) == ["x", "router", "layer0.fc1", "", "layer0.fc2", "layer0.fc2_bias"]


def test_a_bias_that_a_caller_may_set_stays():
    model = moe_model(INTERLEAVED, bias="zero")
    for name, n in (("layer0.fc1_bias", 128), ("layer0.fc2_bias", 64)):
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, 1, [8, n]))
    report = rewrite(model, RULES).report
    assert not report.applied and not report.declines


def test_an_activation_that_nothing_runs_is_not_its_business():
    """As the model builder of onnxruntime-genai writes Gemma 4: rule moe-to-qmoe says that it has no kernel."""
    report = rewrite(moe_model(INTERLEAVED | {"activation_type": "geglu"}, bias="zero"), RULES).report
    assert not report.applied and not report.declines
