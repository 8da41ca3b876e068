"""swiglu-interleave: concatenated gate and linear rows in turn, where the target runs only that."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from moe_models import (
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

RULES = rule_set(["swiglu-interleave"])
CONCATENATED = SWIGLU | {"swiglu_fusion": 2, "k": 2, "normalize_routing_weights": 1}


@pytest.mark.parametrize("bias", ["none", "random"])
def test_interleaved_form_runs_and_agrees(bias):
    model = moe_model(CONCATENATED, bias=bias)
    result = rewrite(model, RULES)
    assert result.report.applied == {"swiglu-interleave": 1}
    (node,) = nodes_of(result.model, "MoE")
    assert attributes_of(node)["swiglu_fusion"] == 1 and node.name == "moe0"
    assert relative(ort(result.model, feeds()), reference(model, feeds())) < 1e-5
    both = np.concatenate(halves_apart(initializers_of(result.model)[node.input[2]]), axis=1)
    np.testing.assert_array_equal(both, initializers_of(model)["layer0.fc1"])
    assert not rewrite(result.model, RULES).report.applied


def test_left_alone_where_the_target_runs_it_or_runs_nothing():
    for target in ("cuda:sm80@1.31", "dml"):
        report = rewrite(moe_model(CONCATENATED), RULES, target).report
        assert not report.applied and not report.declines


def test_declines():
    given = moe_model(CONCATENATED)
    given.graph.input.append(onnx.helper.make_tensor_value_info("layer0.fc1_bias", 1, [8, 128]))
    assert_declines(given, RULES, "fc1_bias is not constant")
    output = moe_model(CONCATENATED)
    output.graph.output.append(onnx.helper.make_tensor_value_info("layer0.fc1", 1, [8, 128, 64]))
    assert_declines(output, RULES, "the float weight fc1 would stay in the model: it is a graph output")
