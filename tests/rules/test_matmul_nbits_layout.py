"""matmul-nbits-layout: B raw to CUTLASS and back."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from moe_models import attributes_of, initializers_of, make_model, nodes_of, ort, rewrite, rule_set, untouched
from onnx import helper

from rewriter.operators.matmul_nbits import LAYOUTS, RAW
from rewriter.quantize.types import QuantizedShape


def layout(name="auto"):
    return rule_set([{"matmul-nbits-layout": {"layout": name}}])


def linear(*, n=64, k=128, bits=4, block=32, symmetric=True, dtype=np.float16):
    weight = np.random.default_rng(0).standard_normal((k, n)).astype(dtype)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="linear")],
        "g",
        [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), ["T", k])],
        [helper.make_tensor_value_info("y", helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), ["T", n])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    rules = rule_set(["matmul-to-matmul-nbits"], bits=bits, block_size=block, symmetric=symmetric)
    return rewrite(make_model(graph), rules).model


def prepacked(model, *, bits):
    """The model with B as sm90 had it, which no release runs any more but exports hold."""
    (node,) = nodes_of(model, "MatMulNBits")
    value = next(i for i in model.graph.initializer if i.name == node.input[1])
    b = onnx.numpy_helper.to_array(value)
    shape = QuantizedShape(64, 128, bits, 32)
    codes = RAW.require(shape).unpack_codes(b)
    value.CopyFrom(
        onnx.numpy_helper.from_array(LAYOUTS[2].require(shape).pack_codes(codes).reshape(b.shape), value.name)
    )
    node.attribute.append(helper.make_attribute("weight_prepacked", 2))
    return model


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("architecture", ["sm80", "sm90"])
def test_there_and_back(*, architecture, bits):
    raw = linear(bits=bits)
    if architecture == "sm80":
        there = rewrite(raw, layout("cutlass-sm80"), "cuda")
        (proof,) = there.report.proofs
        assert proof.runtime == "reference" and proof.max_relative < 1e-5
        there = there.model
    else:
        there = prepacked(linear(bits=bits), bits=bits)
    (node,) = nodes_of(there, "MatMulNBits")
    assert attributes_of(node)["weight_prepacked"] == {"sm80": 1, "sm90": 2}[architecture]
    back = rewrite(there, layout(), "cpu").model
    (node,), (first,) = nodes_of(back, "MatMulNBits"), nodes_of(raw, "MatMulNBits")
    assert "weight_prepacked" not in attributes_of(node)
    np.testing.assert_array_equal(initializers_of(back)[node.input[1]], initializers_of(raw)[first.input[1]])
    x = {"x": np.random.default_rng(1).standard_normal((3, 128)).astype(np.float16)}
    np.testing.assert_array_equal(ort(back, x), ort(raw, x))


def given(model):
    (node,) = nodes_of(model, "MatMulNBits")
    value = next(i for i in model.graph.initializer if i.name == node.input[1])
    model.graph.input.append(helper.make_tensor_value_info(value.name, value.data_type, value.dims))
    return model


DECLINES = {
    "target": (linear, "cutlass-sm80", "cpu@1.31", "does not read cutlass-sm80"),
    "version": (linear, "cutlass-sm80", "cuda:sm80@1.27", "does not read cutlass-sm80"),
    "bits": (lambda: linear(bits=2), "cutlass-sm80", "cuda", "4 or 8 bits in blocks of 32"),
    "sm90": (linear, "cutlass-sm90", "cuda:sm90@1.31", "does not read cutlass-sm90"),
    "block": (lambda: linear(block=64), "cutlass-sm80", "cuda@1.31", "in blocks of 32 without zero points"),
    "zero points": (lambda: linear(symmetric=False), "cutlass-sm80", "cuda@1.31", "without zero points"),
    "type": (lambda: linear(dtype=np.float32), "cutlass-sm80", "cuda@1.31", "of float16 only"),
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
