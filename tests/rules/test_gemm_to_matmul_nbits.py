"""gemm-to-matmul-nbits: a Gemm with a constant weight, its bias included."""

from __future__ import annotations

import numpy as np
import pytest
from linear_models import agrees, dequantized, linear_model, nodes, quantized, weights
from moe_models import rule_set
from support import histogram, snapshot

import rewriter
from rewriter.testing import check_rule, projections, unrolled_experts

RULE = ["gemm-to-matmul-nbits"]
X = weights(3, 40, seed=1)


def gemm(attributes="", bias=None, *, transposed=False, extra=""):
    arrays = {"w": weights(12, 40) if transposed else weights(40, 12)}
    if bias is not None:
        arrays["c"] = weights(*bias, seed=2)
    inputs = ", ".join(["x", *arrays])
    return linear_model(f"y = Gemm {attributes} ({inputs}) {extra}", arrays)


@pytest.mark.parametrize("transposed", [False, True])
def test_fires_and_agrees(transposed):
    result = quantized(gemm("<transB = 1>" if transposed else "", transposed=transposed), RULE)
    assert result.report.applied == {"gemm-to-matmul-nbits": 1} and not result.report.declines
    assert histogram(result.model) == {"MatMulNBits": 1}
    (node,) = nodes(result.model, "MatMulNBits")
    agrees(result, X.astype(np.float64) @ dequantized(node).T, {"x": X})


BIASES = {
    (12,): {"MatMulNBits": 1},
    (1, 12): {"MatMulNBits": 1, "Add": 1},
    (1,): {"MatMulNBits": 1, "Add": 1},
    (): {"MatMulNBits": 1, "Add": 1},
}


@pytest.mark.parametrize("shape", BIASES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_bias_of_any_shape(shape, symmetric):
    result = quantized(gemm("<transB = 1>", shape, transposed=True), RULE, quantization__default__symmetric=symmetric)
    assert histogram(result.model) == BIASES[shape]
    (node,) = nodes(result.model, "MatMulNBits")
    expected = X.astype(np.float64) @ dequantized(node).T + weights(*shape, seed=2)
    agrees(result, expected, {"x": X})


def test_a_bias_of_one_output_feature_is_no_scalar():
    arrays = {"w": weights(40, 1), "c": weights(1, seed=2)}
    result = quantized(linear_model("y = Gemm (x, w, c)", arrays), RULE)
    (node,) = nodes(result.model, "MatMulNBits")
    agrees(result, X.astype(np.float64) @ dequantized(node).T + arrays["c"], {"x": X})


def test_a_target_whose_kernel_has_no_bias():
    result = rewriter.apply(gemm(bias=(12,)), RULE, target="cuda@1.28", overrides={"parity.local": "none"})
    assert histogram(result.model) == {"MatMulNBits": 1, "Add": 1}


DECLINES = {
    "transA is set; MatMulNBits reads x as it is": "<transA = 1>",
    "alpha is 0.5; MatMulNBits has no such factor": "<alpha = 0.5>",
    "beta is 0.5; MatMulNBits adds its bias as it is": "<beta = 0.5>",
}


@pytest.mark.parametrize("reason", DECLINES)
def test_declines(reason):
    model = gemm(DECLINES[reason], (12,))
    if "transA" in reason:
        model = linear_model("t = Transpose (x) y = Gemm <transA = 1> (t, w)", {"w": weights(40, 12)})
    before = snapshot(model)
    result = quantized(model, RULE)
    assert [d.reason for d in result.report.declines] == [reason]
    assert not result.report.applications and histogram(result.model) == histogram(model)
    assert snapshot(model) == before


def test_beta_is_no_matter_without_a_bias():
    result = quantized(gemm("<beta = 0.5>"), RULE)
    assert result.report.applied == {"gemm-to-matmul-nbits": 1}


def test_declines_what_matmul_declines():
    shared = linear_model("a = Gemm (x, w) b = ReduceMax <keepdims = 0> (w) y = Add (a, b)", {"w": weights(40, 12)})
    (decline,) = quantized(shared, RULE).report.declines
    assert decline.reason.startswith("the float weight would stay in the model: ReduceMax")


def test_idempotent():
    once = quantized(gemm(bias=(1, 12)), RULE).model
    assert not quantized(once, RULE).report.applications


def test_a_weight_shared_with_a_matmul_is_quantized_once():
    body = "a = Gemm (x, w) b = MatMul (x, w) y = Add (a, b)"
    result = quantized(linear_model(body, {"w": weights(40, 12)}), ["matmul-to-matmul-nbits", *RULE])
    assert result.report.applied == {"gemm-to-matmul-nbits": 1, "matmul-to-matmul-nbits": 1}
    assert sorted(result.model.graph.initializers) == ["w_q4", "w_scales"]


def test_a_weight_read_both_ways_round_is_two():
    body = "a = Gemm <transB = 1> (x, w) b = MatMul (x, w) y = Add (a, b)"
    result = quantized(linear_model(body, {"w": weights(40, 40)}), ["matmul-to-matmul-nbits", *RULE])
    assert len(result.model.graph.initializers) == 4
    first, second = (dequantized(node) for node in nodes(result.model, "MatMulNBits"))
    agrees(result, X.astype(np.float64) @ (first + second).T, {"x": X})


def test_holds_on_whatever_is_drawn():
    check_rule("gemm-to-matmul-nbits", projections(consumers=("gemm", "gemm-bias", "gemm-scaled", "gemm-transA")))


def test_holds_after_unstack():
    models = unrolled_experts(max_size=20, consumers=("gemm", "gemm-bias", "matmul"), repeats=False)
    check_rule(rule_set(["unstack"], RULE, bits=4), models)


def test_a_weight_that_another_reader_keeps_in_float_is_not_stored_twice():
    body = "a = MatMul (x, w) b = Gemm <alpha = 0.5> (x, w) y = Add (a, b)"
    result = quantized(linear_model(body, {"w": weights(40, 12)}), ["matmul-to-matmul-nbits", *RULE])
    assert list(result.model.graph.initializers) == ["w"] and not result.report.applied
    reasons = {decline.rule: decline.reason for decline in result.report.declines}
    factor = "alpha is 0.5; MatMulNBits has no such factor"
    stays = f"the float weight would stay in the model: Gemm also reads it, and {factor}"
    assert reasons == {"matmul-to-matmul-nbits": stays, "gemm-to-matmul-nbits": factor}
