"""matmul-nbits-layout: B raw to CUTLASS and back."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from moe_models import attributes_of, initializers_of, make_model, nodes_of, ort, rewrite, rule_set, untouched
from onnx import helper


def layout(name="auto"):
    return rule_set([{"matmul-nbits-layout": {"layout": name}}])


def linear(*, n=64, k=128, bits=4, block=64, symmetric=True):
    weight = np.random.default_rng(0).standard_normal((k, n)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="linear")],
        "g",
        [helper.make_tensor_value_info("x", 1, ["T", k])],
        [helper.make_tensor_value_info("y", 1, ["T", n])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    rules = rule_set(["matmul-to-matmul-nbits"], bits=bits, block_size=block, symmetric=symmetric)
    return rewrite(make_model(graph), rules).model


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("architecture", "code"), [("sm80", 1), ("sm90", 2)])
def test_there_and_back(*, architecture, code, bits, symmetric):
    raw = linear(bits=bits, symmetric=symmetric)
    there = rewrite(raw, layout(f"cutlass-{architecture}"), f"cuda:{architecture}")
    (node,) = nodes_of(there.model, "MatMulNBits")
    assert attributes_of(node)["weight_prepacked"] == code
    (proof,) = there.report.proofs
    assert proof.runtime == "reference" and proof.max_relative < 1e-5
    back = rewrite(there.model, layout(), "cpu").model
    (node,), (first,) = nodes_of(back, "MatMulNBits"), nodes_of(raw, "MatMulNBits")
    assert "weight_prepacked" not in attributes_of(node)
    np.testing.assert_array_equal(initializers_of(back)[node.input[1]], initializers_of(raw)[first.input[1]])
    x = {"x": np.random.default_rng(1).standard_normal((3, 128)).astype(np.float32)}
    np.testing.assert_array_equal(ort(back, x), ort(raw, x))


def given(model):
    (node,) = nodes_of(model, "MatMulNBits")
    value = next(i for i in model.graph.initializer if i.name == node.input[1])
    model.graph.input.append(helper.make_tensor_value_info(value.name, value.data_type, value.dims))
    return model


DECLINES = {
    "target": (linear, "cutlass-sm80", "cpu@1.31", "reads raw, not cutlass-sm80"),
    "version": (linear, "cutlass-sm80", "cuda:sm80@1.27", "reads raw, not cutlass-sm80"),
    "bits": (lambda: linear(bits=2), "cutlass-sm80", "cuda:sm80", "the CUTLASS layout exists for 4 and 8"),
    "shape": (lambda: linear(k=96, block=32), "cutlass-sm80", "cuda:sm80", "K = 96 is not a multiple of 64"),
    "constant": (lambda: given(linear()), "cutlass-sm80", "cuda:sm80", "B is not constant"),
}


@pytest.mark.parametrize("name", DECLINES)
def test_declines(name):
    make, wanted, target, reason = DECLINES[name]
    model = make()
    result = rewrite(model, layout(wanted), target)
    assert [reason in d.reason for d in result.report.declines] == [True], result.report.declines
    assert result.model.graph.SerializeToString(deterministic=True) == untouched(model)
