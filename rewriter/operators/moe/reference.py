"""Reference com.microsoft::MoE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnx.reference.op_run import OpRun

from rewriter.operators.form import ExpertForm
from rewriter.operators.moe import MOE, SHARED_ATTRIBUTES
from rewriter.operators.operator import DOMAIN
from rewriter.operators.reference.common import Array, Float32, as_float32, malformed, reshaped, slots
from rewriter.operators.reference.experts import (
    Linear,
    feed_forward,
    flatten_tokens,
    mix,
    require_activation,
    route,
)

OPERATOR = MOE.name


class MoE(OpRun):
    """A mixture of experts with float weights, computed in float32 and returned in x's dtype.

    Source: the operator's schema; checked against ONNX Runtime's CPU kernel where that has one.
    """

    op_domain = DOMAIN

    def _run(self, *inputs: Array | None, **attributes: Any) -> tuple[Array]:
        """Runs the operator on x, router_probs, fc1, fc1_bias, fc2, fc2_bias [, fc3, fc3_bias].

        Raises:
            TargetError: a combination that ONNX Runtime does not define.
            ModelError: shapes that do not belong together, or an unknown attribute.
        """
        x, logits, w1, b1, w2, b2, w3, b3 = slots(OPERATOR, inputs, required=(0, 1, 2, 4), total=8)
        form = shared_form(OPERATOR, attributes)
        experts, hidden, inter = _sizes(w1, w2)
        wide = form.fused * inter
        fc1 = _linear("fc1", w1, b1, (experts, wide, hidden))
        fc2 = _linear("fc2", w2, b2, (experts, hidden, inter))
        fc3 = None if w3 is None else _linear("fc3", w3, b3, (experts, inter, hidden))
        expert = feed_forward(OPERATOR, form, fc1, fc2, fc3)
        tokens = as_float32(flatten_tokens(OPERATOR, x, "input", hidden))
        probs = as_float32(flatten_tokens(OPERATOR, logits, "router_probs", experts))
        selected, weights = route(OPERATOR, form, probs)
        return (mix(tokens, selected, weights, expert).reshape(x.shape).astype(x.dtype),)


def shared_form(operator: str, attributes: Mapping[str, Any]) -> ExpertForm:
    """Returns what the attributes that MoE and QMoE share say.

    Raises:
        TargetError: an activation that ONNX Runtime does not define.
        ModelError: an attribute that the operator does not have.
    """
    unknown = sorted(attributes.keys() - SHARED_ATTRIBUTES.keys())
    if unknown:
        raise malformed(operator, f"unknown attributes {unknown}")
    form = ExpertForm.of(attributes)
    require_activation(operator, form)
    return form


def _sizes(w1: Array, w2: Array) -> tuple[int, int, int]:
    """Returns E, H and I, read off fc2 [E, H, I]."""
    if w1.ndim != 3 or w2.ndim != 3:
        raise malformed(OPERATOR, f"fc1 {list(w1.shape)} and fc2 {list(w2.shape)} must have rank 3")
    experts, hidden, inter = w2.shape
    return experts, hidden, inter


def _linear(name: str, weight: Array, bias: Array | None, shape: tuple[int, int, int]) -> Linear:
    if weight.shape != shape:
        raise malformed(OPERATOR, f"{name} has shape {list(weight.shape)}; expected {list(shape)}")
    offsets = None if bias is None else reshaped(OPERATOR, f"{name}_bias", bias, shape[:2])

    def run(expert: int, x: Float32) -> Float32:
        y = x @ as_float32(weight[expert]).T
        return y if offsets is None else y + as_float32(offsets[expert])

    return run
