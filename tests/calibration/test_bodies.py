"""Weights in the bodies of control flow and of functions: quantized without inputs, and the report says why."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import rewriter
from rewriter import calibrate
from rewriter.cli.tables import not_calibrated

GPTQ = {"quantization.default.algorithm": "gptq", "parity.local": "none"}
BODIES = {
    "If": (
        "y = If (c) <then_branch = t () => (float[T,32] u) { u = MatMul (h, V) },"
        " else_branch = e () => (float[T,32] v) { v = Neg (h) }>"
    ),
    "Loop": (
        "n = Constant <value = int64 {2}> () y = Loop (n, c, h) <body = b (int64 i, bool go, float[T,32] s) =>"
        " (bool on, float[T,32] u) { on = Identity (go) u = MatMul (s, V) }>"
    ),
    "a function": "y = local.F (h)",
    "none": "y = MatMul (h, V)",
}


def model(kind):
    graph = f"g (float[T,32] x, bool c) => (float[T,32] y) {{ h = MatMul (x, W) {BODIES[kind]} }}"
    found = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21, "local" : 1]>\n{graph}')
    rng = np.random.default_rng(0)
    for name in "WV":
        array = rng.standard_normal((32, 32)).astype(np.float32)
        found.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    if kind == "a function":
        weight = onnx.helper.make_node("Constant", [], ["V"], value=found.graph.initializer.pop())
        product = onnx.helper.make_node("MatMul", ["h", "V"], ["y"])
        opsets = [onnx.helper.make_opsetid("", 21)]
        found.functions.append(onnx.helper.make_function("local", "F", ["h"], ["y"], [weight, product], opsets))
    return found


@pytest.mark.parametrize("kind", BODIES)
def test_each_weight_is_calibrated_or_the_report_says_why_not(kind, tmp_path):
    feeds = [{"x": np.random.default_rng(1).standard_normal((80, 32)).astype(np.float32), "c": np.array(True)}]
    calibration = calibrate(model(kind), tmp_path / "c", feeds=feeds)
    result = rewriter.apply(model(kind), "moe-int4", overrides=GPTQ, calibration=calibration)
    result.save(tmp_path / "o")
    found = {weight.name: weight for weight in result.report.weights}
    assert (found["W"].algorithm, found["W"].uncalibrated) == ("gptq", "")
    said = not_calibrated(result.report.weights)
    if kind == "none":
        assert (found["V"].algorithm, said) == ("gptq", "")
    else:
        assert (found["V"].algorithm, found["V"].planned_algorithm) == ("mse-search", "gptq")
        assert f"stand in the body of {kind}, of which no values can be captured (1 of no role)" in said
        assert found["V"].uncalibrated in said
