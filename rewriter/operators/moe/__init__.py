"""com.microsoft::MoE: its slots, its attributes and what their absence means."""

from __future__ import annotations

from collections.abc import Mapping

from rewriter.operators.operator import ExpertsOperator, Plain, Slots

SHARED_ATTRIBUTES: Mapping[str, Plain] = {
    "k": 1,
    "activation_type": "relu",
    "activation_alpha": 1.0,
    "activation_beta": 0.0,
    "normalize_routing_weights": 0,
    "use_sparse_mixer": 0,
    "swiglu_fusion": 0,
    "swiglu_limit": float("inf"),
}
"""Attributes of every operator that runs experts."""

MOE = ExpertsOperator(
    name="MoE",
    inputs=(
        "input",
        "router_probs",
        "fc1_experts_weights",
        "fc1_experts_bias?",
        "fc2_experts_weights",
        "fc2_experts_bias?",
        "fc3_experts_weights?",
        "fc3_experts_bias?",
    ),
    attributes=SHARED_ATTRIBUTES,
    projections=(Slots("fc1", 2, 3), Slots("fc2", 4, 5), Slots("fc3", 6, 7)),
)
