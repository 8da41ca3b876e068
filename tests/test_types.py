"""Models without value_info: what is missing is inferred, whatever operators of ONNX Runtime stand between."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxscript.rewriter import pattern

import rewriter
from rewriter.facts import Facts
from rewriter.facts.constants import constants
from rewriter.facts.types import infer_types
from rewriter.io.copies import own_copy

MODELS = Path(__file__).parent / "models"


def parsed(body, inputs="float[b,s,64] x", outputs="float[b,s,64] y", **arrays):
    header = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'
    proto = onnx.parser.parse_model(f"{header} g ({inputs}) => ({outputs}) {{ {body} }}")
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    return proto


def typed(proto):
    """A model with the types that follow from the others."""
    model = own_copy(proto)
    known = Facts(model, constants)
    known.compute()
    infer_types(model, known)
    return model


def random(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    "name",
    [
        "hf_exporter/gpt_oss__default",  # rows of the batch and of a block are one dimension, and inference names two
        "mobius/gemma4_silu_static_unroll_pr324_f32",  # a function that ONNX infers nothing of
        "mobius/qwen3_moe_dense_ortq4",  # MatMulNBits
    ],
)
def test_as_much_is_fused_without_value_info(name):
    proto = onnx.load(MODELS / f"{name}.onnx")
    rules = {"extends": "fuse-experts", "phases": [{"name": "pack", "rules": ["pack-qkv"]}]}
    given = rewriter.apply(proto, rules).report
    proto.graph.ClearField("value_info")
    report = rewriter.apply(proto, rules).report
    assert report.applied == given.applied and report.applied["fuse-experts"] == 2
    assert not [decline for decline in report.declines if "unknown" in decline.reason]


def test_types_follow_from_operators_of_onnx_runtime():
    body = """
        a = com.microsoft.MatMulNBits <K = 64, N = 32, bits = 4, block_size = 32> (x, codes, scales)
        b, , , c = com.microsoft.SkipSimplifiedLayerNormalization (a, a, gamma)
        d = Add (b, c)
        y = com.microsoft.Unknown (d)
        z = Neg (y)
    """
    codes = np.zeros((32, 2, 16), np.uint8)
    proto = parsed(body, outputs="float[b,s,32] y, float z", codes=codes, scales=random(32, 2), gamma=random(32))
    proto.graph.output[1].type.tensor_type.ClearField("shape")
    values = {value.name: value for node in typed(proto).graph for value in node.outputs}
    for name in "abcd":
        assert values[name].dtype == ir.DataType.FLOAT and str(values[name].shape) == "[b,s,32]", name
    assert values["z"].shape is None, "what is declared stays as it is"
    assert [node.op_type for node in typed(proto).graph] == [node.op_type for node in proto.graph.node]
    assert list(typed(proto).graph.initializers) == ["codes", "scales", "gamma"]


def test_what_has_a_type_tells_what_follows_from_it():
    body = """
        a = Relu (x)
        both = Shape (a)
        one = Gather <axis = 0> (both, zero)
        target = Concat <axis = 0> (one, rest)
        b = Reshape (a, target)
        y = Neg (b)
    """
    numbers = {"zero": np.array([0]), "rest": np.array([16, 4])}
    proto = parsed(body, inputs="float[3,64] x", outputs="float[3,16,4] y", **numbers)
    declared = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    for name in ("b", "target"):
        kept = [value for value in declared.graph.value_info if value.name != name]
        del declared.graph.value_info[:]
        declared.graph.value_info.extend(kept)
        values = {value.name: value for node in typed(declared).graph for value in node.outputs}
        assert [str(values[name].shape) for name in ("a", "target", "b")] == ["[3,64]", "[3]", "[3,16,4]"]


def test_an_index_without_a_type_is_no_obstacle():
    proto = parsed("i = Abs (x) y = Gather (table, i)", inputs="int64[b,s] x", table=random(256, 64))
    assert rewriter.apply(proto).report.applied == {"gather-to-gather-block-quantized": 1}


def test_a_plain_rule_sees_the_types_of_what_it_matches():
    def is_typed(context, a, **_):
        del context
        return a.dtype is not None and a.shape is not None

    rule = pattern.RewriteRule(lambda op, a: op.Relu(a), lambda op, a: op.Max(a, a), is_typed)
    body = "a = Relu (x) b = Neg (a) c = Relu (b) d = Neg (c) y = Relu (d)"
    assert rewriter.apply(parsed(body), [rule], overrides={"parity.local": "none"}).report.applied == {
        "rewrite-rule": 3
    }


def test_statistics_of_a_norm_have_no_type_that_onnx_guesses():
    """ONNX gives them the type of the first output; in half precision the runtime computes them in float32."""
    scale = random(64).astype(np.float16)
    body = "n, mean, inverse, sum = com.microsoft.SkipSimplifiedLayerNormalization (x, x, scale) y = Identity (sum)"
    model = typed(parsed(body, "float16[b,s,64] x", "float16[b,s,64] y", scale=scale))
    found = {value.name: value.dtype for node in model.graph for value in node.outputs}
    half = ir.DataType.FLOAT16
    assert found == {"n": half, "mean": None, "inverse": None, "sum": half, "y": half}


def test_a_part_of_a_constant_has_a_type_without_inference(monkeypatch):
    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", None)
    body = "expert = Gather <axis = 0> (w, one) t = Transpose <perm = [1, 0]> (expert) y = MatMul (x, t)"
    model = typed(parsed(body, outputs="float[b,s,32] y", w=random(2, 32, 64), one=np.array(1)))
    types = {value.name: (value.dtype, str(value.shape)) for node in model.graph for value in node.outputs}
    assert (types["expert"], types["t"]) == ((ir.DataType.FLOAT, "[32,64]"), (ir.DataType.FLOAT, "[64,32]"))


def test_what_a_model_declares_of_its_outputs_stays():
    """MatMul's input has no type, so types are inferred: those of inputs and outputs are the user's."""
    text = "g (float[T,4] x) => (float[N,M] y) <float[4,3] w = {1,2,3,4,5,6,7,8,9,10,11,12}>"
    body = "{ a = Relu (x) y = MatMul (a, w) }"
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {text} {body}')
    made = typed(proto)
    assert made.graph[0].outputs[0].shape is not None, "it was inferred"
    after = ir.to_proto(made).graph
    assert (list(after.input), list(after.output)) == (list(proto.graph.input), list(proto.graph.output))
