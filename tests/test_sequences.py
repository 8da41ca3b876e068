"""A sequence or an optional keeps its type: inference would note the type of an element."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from rewriter.facts import Facts
from rewriter.facts.types import infer_types
from rewriter.io.copies import own_copy
from rewriter.parity.runtime import OrtRuntime

BODIES = {
    "split": "sq = SplitToSequence<axis=1>(x) h = ConcatFromSequence<axis=1>(sq)",
    "construct": "sq = SequenceConstruct(x, x) h = SequenceAt(sq, zero)",
    "passed on": "own = SequenceConstruct(x) sq = Identity(own) h = SequenceAt(sq, zero)",
    "optional": "sq = Optional(x) h = OptionalGetElement(sq)",
}


@pytest.mark.parametrize("body", BODIES)
def test_no_tensor_type_is_noted_for_it(body):
    text = '<ir_version: 10, opset_import: ["" : 18]> g (float[2,4] x) => (float[2,32] y) <int64 zero = {0}>'
    proto = onnx.parser.parse_model(f"{text} {{ {BODIES[body]} y = MatMul(h, w) }}")
    weight = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    model = own_copy(proto)
    infer_types(model, Facts(model, ()))
    assert model.graph[-1].inputs[0].shape is not None, "types were inferred"
    (sequence,) = [v for node in model.graph for v in node.outputs if v.name == "sq"]
    assert not isinstance(sequence.type, ir.TensorType)
    x = np.ones((2, 4), np.float32)
    np.testing.assert_allclose(OrtRuntime().run(ir.to_proto(model), {"x": x})["y"], x @ weight, rtol=1e-5)
