"""Weights that are read through model-local functions: these are inlined, the others stay."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import rewriter

W = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
MATMUL = helper.make_node("MatMul", ["a", "w"], ["o"], name="product")
CONSTANT = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(W, ""))


def function(name, inputs, nodes, *, opset=21, domain="local"):
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("local", 1)]
    return helper.make_function(domain, name, inputs, ["o"], nodes, imports)


def call(name, inputs, output, domain="local"):
    return helper.make_node(name, inputs, [output], name=f"call_{output}", domain=domain)


def model(nodes, functions, **weights):
    io = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["b", 64]) for name in "xy"]
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "g", io[:1], io[1:], initializers)
    imports = [
        helper.make_opsetid(domain, version) for domain, version in (("", 21), ("local", 1), ("com.microsoft", 1))
    ]
    proto = helper.make_model(graph, opset_imports=imports, ir_version=10, functions=functions)
    onnx.checker.check_model(proto, full_check=True)
    return proto


OLDER = function("Linear", ["a", "w"], [MATMUL], opset=17)
TAKES = function("Linear", ["a", "w"], [MATMUL])
HOLDS = function("Linear", ["a"], [CONSTANT, MATMUL])
TWICE = function("Two", ["a"], [call("Linear", ["a"], "p"), call("Linear", ["p"], "o")])
GIVEN = function("Outer", ["a", "v"], [helper.make_node("Identity", ["v"], ["t"]), call("Linear", ["a", "t"], "o")])
LINEAR = call("Linear", ["x", "W"], "y")
MODELS = {
    "given": (model([LINEAR], [TAKES], W=W), 1),
    "given moved": (
        model([helper.make_node("Transpose", ["W"], ["t"]), call("Linear", ["x", "t"], "y")], [TAKES], W=W),
        1,
    ),
    "handed on": (model([call("Outer", ["x", "W"], "y")], [GIVEN, TAKES], W=W), 1),
    "of an older opset that says the same": (
        model([LINEAR], [function("Linear", ["a", "w"], [MATMUL], opset=17)], W=W),
        1,
    ),
    "held": (model([call("Linear", ["x"], "y")], [HOLDS]), 1),
    "held, called twice by another": (model([call("Two", ["x"], "y")], [TWICE, HOLDS]), 2),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_weight_is_quantized_through_functions(case):
    proto, count = MODELS[case]
    result = rewriter.apply(proto, "dense-int4")
    assert result.report.applied == {"matmul-to-matmul-nbits": count} and not result.report.left
    assert not result.model.functions
    assert result.report.bytes_after < W.nbytes / 5  # one weight, however often the function is called
    assert result.check().comparison.outputs["y"].relative_l2 < 0.15


def test_a_function_that_is_called_twice_is_stored_once_where_its_weight_stays():
    proto, _ = MODELS["held, called twice by another"]
    result = rewriter.apply(proto, overrides={"quantization.exclude": [{"nodes": "product*"}]})
    assert not result.report.applications and result.report.bytes_after == W.nbytes
    assert len(result.model.functions) == 2, "nothing fired, so it is what was given"


def test_a_function_without_a_weight_stays():
    relu = function("Act", ["a"], [helper.make_node("Relu", ["a"], ["o"])])
    proto = model([call("Act", ["x"], "h"), helper.make_node("MatMul", ["h", "W"], ["y"])], [relu], W=W)
    result = rewriter.apply(proto)
    assert result.report.applied == {"matmul-to-matmul-nbits": 1} and len(result.model.functions) == 1
