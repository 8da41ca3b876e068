"""Models that the tests of the command line are run on, and what they hold its output against."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from rewriter.report.schema import json_schema

MODELS = Path(__file__).parents[1] / "models"
GRANITE = MODELS / "mobius" / "granitemoehybrid_static_unroll_f32.onnx"
NEEDS_FC3 = MODELS / "genai_old" / "phimoe_int4_cuda_071.onnx"
STACK = "model.layers.0.block_sparse_moe.input_linear.weight"
ROUTER = "model/layers.0/block_sparse_moe/gate/MatMul_node_44"


def linear(path=Path("linear.onnx"), *, weight=None, weight_name="w", node="n", external="", size=None):
    """Writes y = x @ w, w [64, 32], its weight in a data file where ``external`` names one."""
    values = np.arange(64 * 32, dtype=np.float32).reshape(64, 32) if weight is None else weight
    tensor = numpy_helper.from_array(values, weight_name)
    if external:
        raw = tensor.raw_data
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", external), ("offset", "0"), ("length", str(len(raw)))):
            tensor.external_data.add(key=key, value=value)
        if size is not None:
            (path.parent / "w.data").write_bytes(raw[:size])
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", weight_name], ["y"], node)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 32])],
        [tensor],
    )
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    path.write_bytes(model.SerializeToString())
    return path


def tree(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def valid(text, record):
    """Returns JSON that was printed, held against the schema of a record."""
    found = json.loads(text, parse_constant=pytest.fail)
    jsonschema.Draft202012Validator(json_schema(record)).validate(found)
    return found
