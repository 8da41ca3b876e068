"""moe-to-qmoe: a near miss for each of its guards, for what targets lack, and for plans that it cannot hold."""

from __future__ import annotations

import numpy as np
import pytest
from moe_models import (
    INTERLEAVED,
    MOE,
    SWIGLU,
    assert_declines,
    attributes_of,
    moe_model,
    nodes_of,
    rewrite,
    rule_set,
    tensor,
)
from onnx import helper


def replace_initializer(model, name, array):
    for init in model.graph.initializer:
        if init.name == name:
            init.CopyFrom(tensor(array, name))


def weight_as_input(model):
    init = next(i for i in model.graph.initializer if i.name == "layer0.fc1")
    model.graph.input.append(helper.make_tensor_value_info(init.name, 1, init.dims))


def read_elsewhere(model):
    model.graph.node.append(helper.make_node("ReduceSum", ["layer0.fc2"], ["total"]))
    model.graph.output.append(helper.make_tensor_value_info("total", 1, [1, 1, 1]))


def unknown_attribute(model):
    model.graph.node[0].attribute.append(helper.make_attribute("colour", 1))


NEAR_MISSES = {
    "weights that a caller may set": (weight_as_input, "fc1 is not constant"),
    "float copy stays": (read_elsewhere, "the float weight fc2 would stay in the model: ReduceSum also reads it"),
    "unknown attribute": (unknown_attribute, "attributes that MoE does not have, or that a caller sets: colour"),
    "other dtype": (
        lambda m: replace_initializer(m, "layer0.fc1", np.zeros((8, 128, 64), np.float16)),
        "fc1 is FLOAT16 and the input FLOAT",
    ),
    "k": (lambda m: m.graph.node[0].attribute.extend([helper.make_attribute("k", 9)]), "k = 9 of 8 experts"),
    "dims of before August 2025": (
        lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[-1], "dim_value", 96),
        "fc2 has shape [8, 64, 64] and the input 96 features: expected [E, 96, I]",
    ),
    "shape": (
        lambda m: replace_initializer(m, "layer0.fc1", np.zeros((8, 126, 64), np.float32)),
        "fc1 has shape [8, 126, 64]; expected [8, 128, 64]",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name):
    change, reason = NEAR_MISSES[name]
    model = moe_model({key: value for key, value in INTERLEAVED.items() if key != name})
    change(model)
    assert_declines(model, MOE, reason)


FORMS = {
    "activation": ({"activation_type": "geglu"}, {}, "cpu@1.31", "activation 'geglu' has no kernel"),
    "fc3": ({"activation_type": "silu"}, {"fc3": True}, "cpu@1.31", "fc3 beside 'silu' has no kernel"),
    "fusion": (SWIGLU | {"swiglu_fusion": 2}, {}, "cpu@1.31", "swiglu_fusion=2 has no kernel (it runs 1)"),
    "no linear half": (SWIGLU, {}, "cpu@1.31", "has no kernel"),
    "sparse mixer": (
        {"activation_type": "relu", "use_sparse_mixer": 1},
        {},
        "cpu@1.31",
        "use_sparse_mixer has no kernel",
    ),
    "dtype": (INTERLEAVED, {}, "cuda:sm80", "float has no kernel (it runs float16, bfloat16)"),
    "no kernel": (INTERLEAVED, {}, "dml@1.31", "QMoE on target dml@1.31: it has no QMoE"),
    "old cpu": (
        {"activation_type": "relu", "normalize_routing_weights": 1},
        {},
        "cpu@1.24",
        "activation 'relu' has no kernel",
    ),
    "router_weights": (
        INTERLEAVED | {"normalize_routing_weights": 0},
        {},
        "cpu@1.24",
        "router_weights would be needed",
    ),
    "fixed constants": (INTERLEAVED, {"dtype": np.float16}, "cuda:sm80@1.27", "fixed to alpha, beta and limit"),
    "architecture": (
        INTERLEAVED | {"swiglu_limit": 7.0, "activation_alpha": 1.702},
        {"dtype": np.float16},
        "cuda@1.27",
        "named",
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_what_the_target_lacks_is_named(name):
    attributes, options, target, reason = FORMS[name]
    assert_declines(moe_model({"k": 2} | attributes, **options), MOE, reason, target)


PLANS = {
    "bits of the target": ({"bits": 2}, {}, "cpu@1.26", "runs 4, 8 bits, not 2"),
    "bits differ": (
        {"bits": 4},
        {"overrides": [{"role": "expert.down", "bits": 8}]},
        "cpu@1.31",
        "runs projections of different bits (fc1 4 and fc2 8)",
    ),
    "symmetry differs": (
        {"bits": 4},
        {"overrides": [{"role": "expert.down", "symmetric": False}]},
        "cpu@1.30",
        "takes zero points for all projections or for none",
    ),
    "blocks and rows": (
        {"bits": 4},
        {"overrides": [{"role": "expert.down", "block_size": 0}]},
        "cpu@1.31",
        "asks for blocks and for whole rows",
    ),
    "whole stack excluded": (
        {"bits": 4},
        {"exclude": [{"weights": "layer0.fc1"}]},
        "cpu@1.31",
        "fc1: excluded by the plan",
    ),
    "one expert excluded": (
        {"bits": 4},
        {"exclude": [{"weights": "*__slice_3"}]},
        "cpu@1.31",
        "expert 3 of fc1: excluded by the plan (weight *__slice_3); QMoE quantizes a stack whole",
    ),
    "one expert differs": (
        {"bits": 4},
        {"overrides": [{"weights": "layer0.fc2__slice_5", "bits": 8}]},
        "cpu@1.31",
        "gives expert 0 of fc2 4 bits in blocks of 32, symmetric and expert 5 8 bits in blocks of 32, symmetric",
    ),
    "node excluded": ({"bits": 4}, {"exclude": [{"nodes": "moe0"}]}, "cpu@1.31", "excluded by the plan (node moe0)"),
    "one block a row": (
        {"bits": 4, "block_size": 64, "symmetric": False},
        {},
        "cpu@1.30",
        None,
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_plans_that_the_operator_cannot_hold(name):
    default, more, target, reason = PLANS[name]
    rules = rule_set(["moe-to-qmoe"], **default)
    rules["quantization"] |= more
    if reason is None:  # a smaller block is legal
        (node,) = nodes_of(rewrite(moe_model(INTERLEAVED), rules, target).model, "QMoE")
        assert attributes_of(node)["block_size"] == 32
    else:
        assert_declines(moe_model(INTERLEAVED), rules, reason, target)
