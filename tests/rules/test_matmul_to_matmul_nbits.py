"""matmul-to-matmul-nbits: a MatMul with a constant weight, and only that."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from linear_models import agrees, dequantized, linear_model, nodes, quantized, weights
from support import histogram, run, snapshot

import rewriter
from rewriter.errors import QuantizationError
from rewriter.operators.layout.stored import Stored
from rewriter.quantize import ALGORITHMS
from rewriter.quantize.types import QuantizedWeight
from rewriter.rules.blocks import matmul_nbits
from rewriter.testing import check_rule, moe_models, projections

FLOAT = ir.TensorType(ir.DataType.FLOAT)
RULE = ["matmul-to-matmul-nbits"]
X = weights(3, 40, seed=1)


def one(k=40, n=12, dtype=np.float32, **options):
    name = {np.dtype(np.float32): "float", np.dtype(np.float16): "float16"}[np.dtype(dtype)]
    return linear_model("y = MatMul (x, w)", {"w": weights(k, n, dtype=dtype)}, x=("T", k), dtype=name, **options)


def test_fires():
    result = quantized(one(), RULE)
    assert result.report.applied == {"matmul-to-matmul-nbits": 1} and not result.report.declines
    assert histogram(result.model) == {"MatMulNBits": 1}
    (node,) = nodes(result.model, "MatMulNBits")
    assert node.domain == "com.microsoft" and result.model.opset_imports["com.microsoft"] == 1
    assert {a.name: a.value for a in node.attributes.values()} == {"K": 40, "N": 12, "bits": 4, "block_size": 32}
    assert sorted(result.model.graph.initializers) == ["w_q4", "w_scales"]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "block", "k"), [(4, 32, 40), (8, 16, 33), (2, 64, 40), (4, 256, 7), (4, 16, 64)])
def test_agrees(bits, block, k, symmetric, dtype):
    settings = {"bits": bits, "block_size": block, "symmetric": symmetric}
    result = quantized(one(k, dtype=dtype), RULE, quantization__default=settings)
    (node,) = nodes(result.model, "MatMulNBits")
    assert (len(node.inputs) == 4) == (not symmetric)
    x = weights(3, k, dtype=dtype, seed=1)
    tolerance = 1e-5 if dtype == np.float32 else 2e-3
    agrees(result, x.astype(np.float64) @ dequantized(node).T, {"x": x}, tolerance=tolerance)
    (proof,) = result.report.proofs
    assert proof.max_relative <= proof.tolerance


DECLINES = {
    "on the left": ("t = Transpose (x) y = MatMul (w, t)", {"w": (12, 40)}, "the weight is on the left"),
    "several matrices": ("y = MatMul (x, w)", {"w": (2, 40, 12)}, "the weight [2, 40, 12] holds 960 elements in more"),
    "a rank too high": (
        "y = MatMul (x, w)",
        {"w": (1, 40, 12)},
        "the weight has rank 3 and the rank of its input is lower",
    ),
    "read in float too": (
        "a = MatMul (x, w) b = ReduceMax <keepdims = 0> (w) y = Add (a, b)",
        {"w": (40, 12)},
        "the float weight would stay",
    ),
    "part of a stack": (
        "e = Constant <value_int = 1> () v = Gather (w, e) y = MatMul (x, v)",
        {"w": (2, 40, 12)},
        "the weight is part of a constant",
    ),
    "dynamic": (
        "v = Gather (w, i) y = MatMul (x, v)",
        {"w": (2, 40, 12)},
        "the weight is not constant: the index depends on an input",
    ),
}


@pytest.mark.parametrize("case", DECLINES)
def test_declines(case):
    body, shapes, reason = DECLINES[case]
    arrays = {name: weights(*shape) for name, shape in shapes.items()}
    model = linear_model(body, arrays, inputs=", int64 i" if case == "dynamic" else "")
    before = snapshot(model)
    result = quantized(model, RULE)
    (decline,) = result.report.declines
    assert decline.reason.startswith(reason)
    assert not result.report.applications and histogram(result.model) == histogram(model)
    assert snapshot(model) == before


def test_declines_where_the_weight_is_a_graph_output():
    result = quantized(linear_model("y = MatMul (x, w)", {"w": weights(40, 12)}, outputs="y w"), RULE)
    (decline,) = result.report.declines
    assert decline.reason == "the float weight would stay in the model: it is a graph output"


def test_declines_what_the_plan_leaves_out():
    result = quantized(one(), RULE, quantization__exclude=[{"weights": "w"}])
    assert [d.reason for d in result.report.declines] == ["excluded by the plan (weight w)"]


def test_declines_what_the_operator_has_no_form_for():
    result = quantized(one(), RULE, quantization__default={"bits": 3})
    assert [d.reason for d in result.report.declines] == ["bits is 3; MatMulNBits takes 2, 4 or 8"]


@pytest.mark.parametrize(("k", "block"), [(20, 32), (64, 64), (200, 256), (640, 256)])
def test_one_scale_a_row_becomes_the_longest_blocks_and_is_said(k, block, tmp_path):
    result = quantized(one(k), RULE, quantization__default={"block_size": 0})
    result.save(tmp_path / "o")
    (weight,) = result.report.weights
    assert (weight.block_size, result.report.applied) == (block, {RULE[0]: 1})
    (change,) = result.report.changes
    assert "one block a row" in change.planned and f"blocks of {block}" in change.written
    assert change.because.startswith("MatMulNBits has no scale for a whole row")


def test_declines_what_the_target_has_no_kernel_for():
    result = rewriter.apply(one(), RULE, target="cuda@1.28", overrides={"quantization.default.bits": 2})
    assert [d.reason for d in result.report.declines] == [
        "MatMulNBits on cuda@1.28: 2 bits have no kernel in float (it runs 4, 8)"
    ]


@pytest.mark.parametrize("what", ["overridable", "dynamic"])
def test_is_not_about_weights_that_an_input_decides(what):
    model = linear_model(
        "y = MatMul (x, w)", {} if what == "dynamic" else {"w": weights(40, 12)}, inputs=", float[40,12] w"
    )
    result = quantized(model, RULE)
    assert not result.report.applications and len(result.report.declines) == (what == "overridable")


def test_a_leading_one_under_activations_of_that_rank():
    model = linear_model("y = MatMul (x, w)", {"w": weights(1, 40, 12)}, x=(2, "T", 40))
    result = quantized(model, RULE)
    (node,) = nodes(result.model, "MatMulNBits")
    x = weights(2, 3, 40, seed=1)
    agrees(result, x.astype(np.float64) @ dequantized(node).T, {"x": x})


def test_idempotent():
    once = quantized(one(), RULE).model
    assert not quantized(once, RULE).report.applications


def test_a_shared_weight_is_quantized_once():
    body = "a = MatMul (x, w) b = Neg (x) c = MatMul (b, w) d = MatMul (x, v) e = Add (a, c) y = Add (e, d)"
    result = quantized(linear_model(body, {"w": weights(40, 12), "v": weights(40, 12, seed=5)}), RULE)
    assert result.report.applied == {"matmul-to-matmul-nbits": 3}
    assert sorted(result.model.graph.initializers) == ["v_q4", "v_scales", "w_q4", "w_scales"]


def test_the_option_of_the_kernel():
    ruleset = {"phases": [{"name": "q", "rules": [{"matmul-to-matmul-nbits": {"accuracy_level": 4}}]}]}
    result = rewriter.apply(one(k=64), ruleset)
    (node,) = nodes(result.model, "MatMulNBits")
    assert node.attributes["accuracy_level"].as_int() == 4


def test_bfloat16_needs_a_target_that_runs_it():
    model = linear_model("y = MatMul (x, w)", {"w": weights(40, 12)})
    model.graph.initializers["w"].const_value = ir.tensor(
        weights(40, 12).astype(ir.DataType.BFLOAT16.numpy()), dtype=ir.DataType.BFLOAT16, name="w"
    )
    model.graph.initializers["w"].type = model.graph.inputs[0].type = ir.TensorType(ir.DataType.BFLOAT16)
    model.graph.outputs[0].type = ir.TensorType(ir.DataType.BFLOAT16)
    declined = rewriter.apply(model, RULE, target="cpu@1.28").report
    assert [d.reason for d in declined.declines] == [
        "MatMulNBits on cpu@1.28: bfloat16 has no kernel (it runs float, float16)"
    ]
    fired = rewriter.apply(model, RULE, target="cuda@1.28", overrides={"parity.local": "none"})
    assert fired.report.applied == {"matmul-to-matmul-nbits": 1}
    assert fired.model.graph.initializers["w_scales"].dtype == ir.DataType.BFLOAT16


def swapped(weight, context):
    """A quantizer that quantizes another weight: its transpose, where that has the same shape."""
    return ALGORITHMS["rtn"](np.ascontiguousarray(weight.T), context)


def absolute(weight, context):
    good = ALGORITHMS["rtn"](weight, context)
    return QuantizedWeight(good.codes, np.abs(good.scales), None, good.bits, good.block_size)


def test_any_quantizer_gives_an_exact_rewrite():
    """What a quantizer does to a weight is its own affair; that the layout holds it is the rule's."""
    for quantizer in (swapped, absolute):
        result = quantized(one(k=40, n=40), RULE, quantizer=quantizer)
        (node,) = nodes(result.model, "MatMulNBits")
        agrees(result, X.astype(np.float64) @ dequantized(node).T, {"x": X})


def test_a_quantizer_that_breaks_its_promise_is_refused():
    with pytest.raises(QuantizationError, match="broke its promise for weight 'w'"):
        quantized(one(), RULE, quantizer=lambda weight, context: ALGORITHMS["rtn"](weight[:-1], context))


WRONG_BYTES = {
    "nibbles the other way": lambda b, scales: ((b << 4) | (b >> 4), scales),
    "a scale of the wrong sign": lambda b, scales: (b, np.abs(scales)),
    "rows in another order": lambda b, scales: (np.roll(b, 1, axis=0), scales),
}


@pytest.mark.parametrize("fault", WRONG_BYTES)
def test_a_layout_that_is_wrong_on_both_sides_fails_its_proof(fault, monkeypatch):
    """The readback of codes cannot see a layout that packs and unpacks wrongly alike; running it can."""
    right, kept = Stored.pack, {}

    def wrong(stored, weight):
        b, scales, *others = right(stored, weight)
        kept[stored] = weight
        return [*WRONG_BYTES[fault](b, scales), *others]

    monkeypatch.setattr(Stored, "pack", wrong)
    monkeypatch.setattr(Stored, "unpack", lambda stored, arrays: kept[stored])
    (failed,) = quantized(one(k=64), RULE).report.declines
    assert failed.failed and "differs by" in failed.reason


def test_holds_on_whatever_is_drawn():
    check_rule("matmul-to-matmul-nbits", projections())


def test_holds_after_unstack():
    check_rule(["unstack", "matmul-to-matmul-nbits"], moe_models(max_size=10, max_experts=3))


def test_loads_where_the_input_does():
    assert run(quantized(one(), RULE).model, {"x": X})["y"].shape == (3, 12)


@pytest.mark.parametrize(("dtype", "fires"), [("float", True), ("double", False)])
def test_an_input_of_no_known_type_has_the_weights(dtype, fires):
    held = weights(40, 12).astype(np.float32 if dtype == "float" else np.float64)
    model = linear_model("h = Relu (x) y = MatMul (h, w)", {"w": held}, dtype=dtype)
    model.graph[0].op_type, model.graph[0].domain = "Unheard", "of.nobody"
    model.graph[0].outputs[0].type = None
    model.opset_imports["of.nobody"] = 1
    result = quantized(model, RULE)
    assert result.report.applied == ({"matmul-to-matmul-nbits": 1} if fires else {})
    reasons = [decline.reason for decline in result.report.declines]
    assert reasons == ([] if fires else ["the element type of the input is unknown"])


def test_a_weight_that_constants_compute_says_so():
    model = linear_model("t = Mul (w, s) y = MatMul (x, t)", {"w": weights(40, 12), "s": np.array(2, np.float32)})
    (decline,) = quantized(model, RULE).report.declines
    assert decline.reason == "the weight is not constant: Mul computes it from constants" and "fold" in decline.remedy


def test_a_weight_that_is_stored_flat_is_taken_out_by_unstack():
    body = "shape = Constant <value_ints = [40, 12]> () t = Reshape (w, shape) y = MatMul (x, t)"
    result = quantized(linear_model(body, {"w": weights(40, 12).reshape(-1)}), ["unstack", *RULE])
    assert result.report.applied == {"unstack": 1, "matmul-to-matmul-nbits": 1}


@pytest.mark.parametrize(("ir_version", "fires"), [(3, True), (4, False), (10, False)])
@pytest.mark.parametrize("kind", ["a message", "a model"])
def test_a_weight_among_the_inputs_is_constant_only_where_it_must_be_listed(ir_version, fires, kind):
    proto = ir.to_proto(one())
    proto.ir_version = ir_version
    proto.graph.input.add(name="w").CopyFrom(ir.to_proto(ir.Value(name="w", type=FLOAT, shape=ir.Shape([40, 12]))))
    result = quantized(proto if kind == "a message" else ir.from_proto(proto), RULE)
    if fires:
        assert result.report.applied == {"matmul-to-matmul-nbits": 1} and not result.report.declines
        assert result.ir_model.ir_version == 4 and [v.name for v in result.ir_model.graph.inputs] == ["x"]
        assert list(result.check().comparison.outputs) == ["y"]
        return
    (left,), (decline,) = result.report.left, result.report.declines
    assert left.reason == decline.reason
    assert decline.reason.startswith("the weight is not constant: a caller may override it")
    assert decline.remedy.startswith("take it off the graph's inputs")


def test_each_of_many_readers_of_a_weight_is_looked_at_a_few_times(monkeypatch):
    readers = 40
    body = " ".join(f"y{i} = MatMul (x{i}, w)" for i in range(readers))
    before = " ".join(f"x{i} = {'Abs' if i else 'Neg'} ({f'x{i - 1}' if i else 'x'})" for i in range(readers))
    looked = []
    read = matmul_nbits.read_weight
    monkeypatch.setattr(matmul_nbits, "read_weight", lambda *given: looked.append(given) or read(*given))
    total = " ".join(f"s{i} = Add ({f's{i - 1}' if i > 1 else 'y0'}, y{i})" for i in range(1, readers))
    result = quantized(
        linear_model(f"{before} {body} {total} y = Identity (s{readers - 1})", {"w": weights(40, 12)}), RULE
    )
    assert result.report.applied == {"matmul-to-matmul-nbits": readers}
    assert len(looked) <= 3 * readers


@pytest.mark.parametrize(
    ("body", "stored"),
    [
        ("t = Transpose (w) y = MatMul (x, t)", weights(12, 40)),
        ("t = Identity (w) y = MatMul (x, t)", weights(40, 12)),
        ("t = Cast <to = 1> (w) y = MatMul (x, t)", weights(40, 12, dtype=np.float16)),
        ("c = Cast <to = 1> (w) t = Transpose (c) y = MatMul (x, t)", weights(12, 40, dtype=np.float16)),
    ],
)
def test_a_whole_weight_that_is_turned_or_widened_is_quantized_as_it_is_read(body, stored):
    result = quantized(linear_model(body, {"w": stored}), RULE)
    assert set(result.report.applied) == {"matmul-to-matmul-nbits"} and not result.report.declines
    assert "w" not in result.model.graph.initializers and not nodes(result.model, "MatMul")
    x = np.random.default_rng(1).standard_normal((3, 40), dtype=np.float32)
    expected = sum(x.astype(np.float64) @ dequantized(node).T for node in nodes(result.model, "MatMulNBits"))
    agrees(result, expected, {"x": x})
    read = stored if stored.shape == (12, 40) else stored.T
    for node in nodes(result.model, "MatMulNBits"):
        assert np.abs(dequantized(node) - read).max() < 0.5  # the weight itself, not another arrangement of it


@pytest.mark.parametrize(
    ("other", "reader"),
    [
        ("s = ReduceSum (t)", "ReduceSum"),
        ("s = ReduceSum (w)", "ReduceSum"),
        ("c = Identity (t) s = ReduceSum (c)", "ReduceSum"),
        ("s = MatMul (x, t)", "MatMul"),
        ("s = Gemm (x, t)", "Gemm"),
        ("c = Transpose (w) s = Gemm (x, c)", "Gemm"),
        ("s = Gemm <transB = 1> (x, w)", "Gemm"),
        ("i = Constant <value_ints = [0, 1]> () p = Gather <axis = 1> (t, i) s = MatMul (x, p)", "MatMul"),
        ("a, b = Split <axis = 1, num_outputs = 2> (t) s = MatMul (x, b)", "MatMul"),
    ],
)
def test_a_turned_weight_that_something_else_reads_stays(other, reader):
    body = f"t = Transpose (w) y = MatMul (x, t) {other}"
    result = quantized(linear_model(body, {"w": weights(12, 40)}, outputs="y s"), RULE)
    assert not result.report.applied
    assert f"the float weight would stay in the model: {reader} also reads it" in [
        decline.reason for decline in result.report.declines
    ]


@pytest.mark.parametrize(("shape", "fires"), [((1, 64), False), ((2, 64), False), ((64, 1), True), ((64, 2), True)])
def test_a_weight_of_few_rows_or_columns_that_would_grow_is_left_alone(shape, fires):
    result = quantized(linear_model("y = MatMul (x, w)", {"w": weights(*shape)}, x=("T", shape[0])), RULE)
    if fires:
        assert result.report.applied == {"matmul-to-matmul-nbits": 1}
        assert result.report.bytes_after < result.report.bytes_before
        return
    (decline,) = result.report.declines
    assert decline.reason == f"the weight takes {256 * shape[0]} bytes, and would take 1280 quantized"
