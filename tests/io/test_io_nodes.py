"""The nodes of a main graph, read from their messages as onnx-ir reads them."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from rewriter.errors import ModelError
from rewriter.io.messages import from_proto
from rewriter.io.nodes import are_flat

X, Y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]) for name in "xy")


def message(*nodes):
    weight = onnx.numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
    declared = [helper.make_tensor_value_info("a", TensorProto.FLOAT, [None, 4])]
    graph = helper.make_graph(nodes, "g", [X], [Y], [weight], value_info=declared)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])


def plain_nodes():
    first = helper.make_node("MatMul", ["x", "w"], ["a"], name="first", doc_string="why")
    first.metadata_props.add(key="place", value="here")
    split = helper.make_node("Split", ["a", ""], ["b", "", "c"], name="split", axis=1, num_outputs=3)
    again = helper.make_node("Split", ["b"], ["d", "e"], axis=1, num_outputs=2)
    shown = helper.make_node("LeakyRelu", ["d"], ["f"], alpha=0.5)
    last = helper.make_node("Mine", ["f", "c"], ["y"], domain="own", mode="sum", sizes=[1, 2], overload="two")
    return [first, split, again, shown, last]


@pytest.mark.parametrize("turn", [1, -1], ids=["in order", "out of order"])
def test_nodes_are_read_as_onnx_ir_reads_them(turn):
    proto = message(*plain_nodes()[::turn])
    assert are_flat(proto.graph.node)
    expected = ir.to_proto(ir.from_proto(proto))
    model = from_proto(onnx.ModelProto.FromString(proto.SerializeToString()), own=True)
    assert ir.to_proto(model) == expected
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert model.graph.outputs[0].producer().op_type == "Mine"


def test_nodes_with_a_body_are_left_to_onnx_ir():
    body = helper.make_graph([helper.make_node("Identity", ["a"], ["inner"])], "b", [], [Y])
    proto = message(helper.make_node("If", ["x"], ["y"], then_branch=body, else_branch=body))
    assert not are_flat(proto.graph.node)


@pytest.mark.parametrize("outputs", [["a", "a"], ["x", "a"], ["w", "a"]])
def test_what_is_defined_twice_is_said(outputs):
    proto = message(helper.make_node("Split", ["x"], outputs, name="twice", num_outputs=2))
    with pytest.raises(ModelError, match=f"node 'twice' \\(Split\\) defines '{outputs[0]}' a second time"):
        from_proto(proto, own=True)
