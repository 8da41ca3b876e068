"""For each shipped rule, models that it fires on, and the rule itself where its defaults would not let it fire."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from hypothesis.strategies import SearchStrategy

from rewriter.testing import (
    attention_projections,
    moe_models,
    moe_nodes,
    projections,
    quantized_experts,
    quantized_projections,
    tied_embeddings,
    unrolled_experts,
)


def _alone(name: str, *, target: str = "auto", **options: Any) -> dict[str, Any]:
    """A rule set of one rule with options."""
    return {"target": target, "phases": [{"name": "rules", "rules": [{name: options}]}]}


MODELS: dict[str, SearchStrategy[ir.Model]] = {
    "einsum-to-matmul": projections(consumers=("einsum",)),
    "fuse-experts": moe_models(max_experts=3),
    "fuse-quantized-experts": quantized_experts(max_experts=3),
    "gather-to-gather-block-quantized": tied_embeddings(tyings=("untied", "transposed-head")),
    "gemm-to-matmul-nbits": projections(consumers=("gemm", "gemm-bias", "gemm-scaled", "gemm-transA")),
    "matmul-nbits-layout": quantized_projections(layouts=("cutlass-sm90",)),
    "matmul-to-matmul-nbits": projections(),
    "moe-drop-zero-biases": moe_nodes(operators=("MoE",), biases=("zero", "mixed", "real")),
    "moe-fuse-fc3": moe_nodes(operators=("MoE",), activations=("silu-fc3", "swiglu-fc3", "relu-fc3")),
    "moe-to-qmoe": moe_nodes(operators=("MoE",), activations=("relu", "gelu", "silu", "identity", "swiglu")),
    "pack-qkv": attention_projections(packings=("separate",)),
    "qmoe-layout": moe_nodes(operators=("QMoE",), layouts=("cutlass-sm90",)),
    "qmoe-to-moe": moe_nodes(operators=("QMoE",)),
    "share-tied-embedding": tied_embeddings(tyings=("equal", "equal-gemm", "unequal", "gemm-head")),
    "swiglu-interleave": moe_nodes(operators=("MoE",), activations=("swiglu-concatenated", "swiglu")),
    "tie-quantized-embedding": tied_embeddings(),
    "unbatch": projections(obstacles=("several-matrices",), max_size=16),
    "unpack-qkv": attention_projections(packings=("split", "slices")),
    "unstack": unrolled_experts(max_size=12),
}
"""Rule id -> what draws models that it fires on, among others."""

RULES: dict[str, Any] = {
    "gather-to-gather-block-quantized": _alone("gather-to-gather-block-quantized", min_bytes=0),
    "qmoe-to-moe": _alone("qmoe-to-moe", target="cuda@1.31"),  # a step on the way: the CPU provider runs fewer MoEs
    "share-tied-embedding": _alone("share-tied-embedding", min_bytes=0),
    "tie-quantized-embedding": _alone("tie-quantized-embedding", min_bytes=0),
    "unpack-qkv": _alone("unpack-qkv", when="always"),
}
"""Rule id -> the rule with the options that it fires with on ``MODELS``, as ``check_rule`` takes it."""


def rule_of(name: str) -> Any:
    """Returns what ``check_rule`` is given for a rule id."""
    return RULES.get(name, name)
