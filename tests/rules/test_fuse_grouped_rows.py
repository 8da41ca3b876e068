"""Grouped rows (sort, one product for each expert's rows, way back): one broken step, and the block is left alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import rewriter

MODEL = Path(__file__).parents[1] / "models" / "hf_exporter/qwen3_moe__default.onnx"


class Edited:
    """The exported model, to be broken in its first block."""

    def __init__(self):
        self.model = onnx.load(MODEL)
        self.nodes = self.model.graph.node
        self.by_output = {out: node for node in self.nodes for out in node.output}

    def first(self, op_type, **wanted):
        return next(
            n
            for n in self.nodes
            if n.op_type == op_type
            and all(onnx.helper.get_node_attr_value(n, name) == value for name, value in wanted.items())
        )

    def readers(self, name, op_type):
        return [n for n in self.nodes if n.op_type == op_type and name in n.input]

    def constant(self, value, dtype):
        name = f"constant_{len(self.model.graph.initializer)}"
        self.model.graph.initializer.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def initializer(self, name):
        return next(tensor for tensor in self.model.graph.initializer if tensor.name == name)

    @property
    def sort(self):
        return self.first("TopK", largest=0)

    @property
    def groups(self):
        return [n for n in self.nodes if n.op_type == "Concat" and len(n.input) == 4 and self._of_matmuls(n)]

    def _of_matmuls(self, concat):
        return all(self.by_output[i].op_type == "MatMul" for i in concat.input if i in self.by_output)


def histogram_of_other_values(edited):
    node = edited.first("ScatterElements")
    clip = edited.by_output[node.input[1]]
    divided = edited.by_output[edited.by_output[clip.input[0]].input[0]]
    divided.input[1] = edited.constant(0.5, np.float32)


def experts_in_another_order(edited):
    concat = edited.groups[0]
    concat.input[0], concat.input[1] = concat.input[1], concat.input[0]


def an_expert_left_out(edited):
    concat = edited.groups[1]
    concat.input[3] = concat.input[2]


def rows_that_begin_elsewhere(edited):
    ranges = [n for n in edited.nodes if n.op_type == "Range" and edited.readers(n.output[0], "Gather")]
    ranges[1].input[0] = ranges[0].input[0]


def sorted_downwards(edited):
    for attribute in edited.sort.attribute:
        if attribute.name == "largest":
            attribute.i = 1


def the_way_there_for_the_way_back(edited):
    back = edited.first("ScatterND")
    (unsqueeze,) = edited.readers(back.output[0], "Unsqueeze")
    unsqueeze.input[0] = edited.sort.output[1]


def tokens_of_another_number_of_slots(edited):
    divided = edited.readers(edited.sort.output[1], "Div")[0]
    divided.input[1] = edited.constant(4, np.int64)


def weights_not_sorted(edited):
    gathers = [n for n in edited.nodes if n.op_type == "GatherND" and edited.readers(n.output[0], "Unsqueeze")]
    (unsqueeze,) = edited.readers(gathers[0].output[0], "Unsqueeze")
    unsqueeze.input[0] = gathers[0].input[0]


def another_weight_for_one_group(edited):
    product = edited.by_output[edited.groups[0].input[2]]
    product.input[0] = edited.by_output[edited.groups[0].input[1]].input[0]


def rows_counted_in_halves(edited):
    node = edited.first("ScatterElements")
    ones = edited.by_output[node.input[2]]
    node.input[0] = edited.constant([0.0] * 4, np.float16)
    ones.input[0] = edited.constant(1.0, np.float16)
    del edited.model.graph.value_info[:]


BREAKS = [
    histogram_of_other_values,
    experts_in_another_order,
    an_expert_left_out,
    rows_that_begin_elsewhere,
    sorted_downwards,
    the_way_there_for_the_way_back,
    tokens_of_another_number_of_slots,
    weights_not_sorted,
    another_weight_for_one_group,
]


def test_the_whole_model_fuses():
    assert rewriter.apply(Edited().model, "fuse-experts").report.applied == {"fuse-experts": 2}


@pytest.mark.parametrize("broken", BREAKS, ids=lambda f: f.__name__)
def test_a_broken_block_is_left_and_the_other_fuses(broken):
    edited = Edited()
    before = edited.model.SerializeToString()
    broken(edited)
    assert edited.model.SerializeToString() != before
    result = rewriter.apply(edited.model, "fuse-experts")
    assert result.report.applied == {"fuse-experts": 1}
    assert sum(node.op_type == "MoE" for node in result.model.graph.node) == 1
    assert sum(node.op_type == "ScatterND" for node in result.model.graph.node) == 1


def test_a_block_whose_rows_are_counted_in_halves_is_left():
    edited = Edited()
    rows_counted_in_halves(edited)  # which the CPU provider cannot run, so that no proof would show it
    result = rewriter.apply(edited.model, "fuse-experts", overrides={"parity.local": "none"})
    assert result.report.applied == {"fuse-experts": 1}


def test_experts_that_are_compared_in_halves_are_what_they_were():
    edited = Edited()
    node = edited.first("ScatterElements")
    clip = edited.by_output[node.input[1]]
    divided = edited.by_output[edited.by_output[clip.input[0]].input[0]]
    cast = edited.by_output[edited.by_output[divided.input[0]].input[0]]
    cast.attribute[0].i = onnx.TensorProto.FLOAT16
    divided.input[1] = edited.constant(numpy_helper.to_array(edited.initializer(divided.input[1])), np.float16)
    del edited.model.graph.value_info[:]
    assert rewriter.apply(edited.model, "fuse-experts").report.applied == {"fuse-experts": 2}
