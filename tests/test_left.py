"""What stays float says why, and what it says helps does."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxscript.optimizer
import pytest
from onnx import helper, numpy_helper
from onnx.inliner import inline_local_functions

import rewriter

FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
W = np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32)


def node(op, inputs, outputs, **attributes):
    return helper.make_node(op, inputs.split(" "), outputs.split(" "), name=outputs.split(" ")[0], **attributes)


def model(*nodes, inputs=(), functions=(), ir_version=10, x=(FLOAT, ["b", 64]), **weights):
    values = [helper.make_tensor_value_info("x", *x), *inputs]
    graph = helper.make_graph(
        nodes,
        "g",
        values,
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()],
    )
    imports = [helper.make_opsetid(domain, v) for domain, v in (("", 21), ("com.microsoft", 1), ("local", 1))]
    return helper.make_model(graph, opset_imports=imports, ir_version=ir_version, functions=functions)


PRODUCT = node("MatMul", "x w", "y")
LINEAR, KERNEL = [
    helper.make_function(domain, "Linear", ["a", "v"], ["o"], [node("MatMul", "a v", "o")], [opset])
    for domain, opset in (("local", helper.make_opsetid("", 8)), ("com.microsoft", helper.make_opsetid("", 21)))
]
IDS = (INT64, ["b", "s"])
STACK = np.stack([W, W + 1])


def folded(proto):
    found = ir.from_proto(proto)
    onnxscript.optimizer.optimize(found, input_size_limit=1 << 20, output_size_limit=1 << 20)
    return found, "moe-int4"


def inlined(proto):
    return inline_local_functions(proto), "moe-int4"


def at_one_opset(proto):
    proto.functions[0].opset_import[0].version = 21
    return proto, "moe-int4"


def no_input(proto):
    del proto.graph.input[1]
    return proto, "moe-int4"


def no_output(proto):
    del proto.graph.output[1]
    return proto, "moe-int4"


def by_moe_int4(proto):
    return proto, "moe-int4"


def after_unstack(proto):
    sets = {"extends": "unstack", "phases": [{"name": "quantize", "rules": ["matmul-to-matmul-nbits"]}]}
    return proto, sets | {"quantization": {"default": {"bits": 4}}}


def own_copy(proto):
    (reader,) = [n for n in proto.graph.node if n.op_type == "ReduceSum"]
    reader.input[0] = "copy"
    proto.graph.initializer.append(numpy_helper.from_array(W, "copy"))
    return proto, "moe-int4"


def with_output(proto):
    proto.graph.output.append(helper.make_tensor_value_info("w", FLOAT, W.shape))
    return proto


KINDS = {
    "computed by constants": (
        lambda: model(node("Mul", "w s", "v"), node("MatMul", "x v", "y"), w=W, s=np.float32(2)),
        "moe-int4",
        "the weight is not constant: Mul computes it from constants",
        folded,
    ),
    "an embedding that constants compute": (
        lambda: model(node("Mul", "w s", "v"), node("Gather", "v x", "y"), x=IDS, w=W, s=np.float32(2)),
        "moe-int4",
        "the table is not constant: Mul computes it from constants",
        folded,
    ),
    "a caller may override it": (
        lambda: model(PRODUCT, inputs=[helper.make_tensor_value_info("w", FLOAT, W.shape)], w=W),
        "moe-int4",
        "the weight is not constant: a caller may override it",
        no_input,
    ),
    "a graph output": (
        lambda: with_output(model(PRODUCT, w=W)),
        "moe-int4",
        "the float weight would stay in the model: it is a graph output",
        no_output,
    ),
    "another reader": (
        lambda: model(PRODUCT, node("ReduceSum", "w", "z"), w=W),
        "moe-int4",
        "the float weight would stay in the model: ReduceSum also reads it",
        own_copy,
    ),
    "a function of another opset": (
        lambda: model(node("Linear", "x w", "y", domain="local"), functions=[LINEAR], w=W),
        "moe-int4",
        "a call of function local::Linear reads it, whose MatMul mean something else in the opset of the model",
        at_one_opset,
    ),
    "a function that stands in for a kernel": (
        lambda: model(node("Linear", "x w", "y", domain="com.microsoft"), functions=[KERNEL], w=W),
        "moe-int4",
        "a call of function com.microsoft::Linear reads it",
        inlined,
    ),
    "a slice": (
        lambda: model(node("Gather", "w i", "v"), node("MatMul", "x v", "y"), w=STACK, i=np.int64(1)),
        "dense-int4",
        "the weight is part of a constant that stays in the model",
        after_unstack,
    ),
    "an embedding": (
        lambda: model(node("Gather", "w x", "y"), x=IDS, w=W),
        "experts-int4",
        "no rule of experts-int4 reads Gather",
        by_moe_int4,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_stays_float_says_why_and_what_helps_does(kind):
    build, rules, reason, helps = KINDS[kind]
    (left,) = rewriter.apply(build(), rules).report.left
    assert left.name == "w" and left.reason.startswith(reason) and left.remedy
    report = rewriter.apply(*helps(build())).report
    assert [weight.shape for weight in report.weights] or report.applications
    assert "w" not in [weight.name for weight in report.left]


@pytest.mark.parametrize(
    ("nodes", "rules", "reason"),
    [
        ([node("Conv", "x w", "y")], "moe-int4", "no rule of moe-int4 reads Conv"),
        ([node("MatMul", "x w", "y")], "unstack", "rule set unstack quantizes nothing"),
        (
            [node("Gather", "w i", "v"), node("Sin", "v", "y")],
            "moe-int4",
            "the rules of moe-int4 at Gather are about other constants",
        ),
        ([node("Identity", "x", "y"), node("Relu", "w", "z")], "moe-int4", "it is no part of a product or a lookup"),
    ],
)
def test_what_no_rule_is_about_says_so(nodes, rules, reason):
    proto = model(*nodes, inputs=[helper.make_tensor_value_info("i", INT64, ["b"])], w=W)
    (left,) = rewriter.apply(proto, rules).report.left
    assert left.reason.startswith(reason) and not left.rule
