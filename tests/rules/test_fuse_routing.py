"""fuse-experts: routing that no operator has, weights that do not add up to one, and blocks that are not found."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from block_models import COMBINES, GIVEN, STACKED, Spelling, block_model
from onnx import helper, numpy_helper
from test_fuse_experts import FUSE, MODELS, assert_declines, attributes, feeds, fuse, fused, operators, relative

from rewriter.parity.runtime import OrtRuntime, ReferenceRuntime
from rewriter.target import Target


@pytest.mark.parametrize("router", GIVEN)
@pytest.mark.parametrize("combine", ["mask-sum", "scatter", "slots", "chosen", "dense"])
def test_weights_are_given_as_they_are(router, combine):
    model = fused(Spelling(router=router, combine=combine, rank=2 if combine in STACKED else 3, experts=5))
    assert attributes(model)["normalize_routing_weights"] == 1
    assert operators(model)["TopK"] == operators(model)["ScatterElements"] == operators(model)["Log"] == 1


@pytest.mark.parametrize(("experts", "k"), [(2, 2), (4, 3), (4, 4)])
@pytest.mark.parametrize("least", [0.05, 0.9])
def test_a_chosen_expert_may_have_no_weight(experts, k, least):
    """More are chosen than have weights, or none has: what has the logarithm of zero is subtracted from itself."""
    how = Spelling(router="masked", experts=experts, k=k, hidden=4, inter=4)
    model = block_model(how)
    (bound,) = (i for i in model.graph.initializer if numpy_helper.to_array(i).size == 1 and 0.04 < _number(i) < 0.06)
    bound.CopyFrom(numpy_helper.from_array(np.array(least, np.float32), bound.name))
    result = fuse(model)
    assert result.report.applied == {FUSE: 1}
    expected = OrtRuntime().run(model, feeds(how))["y"]
    assert (least < 0.5) or (expected == 0).all(axis=-1).any()
    for runtime in (OrtRuntime(), ReferenceRuntime()):
        assert relative(expected, runtime.run(result.model, feeds(how))["y"]) < 1e-5


def _number(tensor):
    return float(numpy_helper.to_array(tensor).reshape(-1)[0])


def test_what_the_logarithm_does_not_tell_declines():
    told = "no operator has the score function tanh(x)"
    assert_declines(Spelling(router="biased-raw", broken="negative"), told)
    broken = fuse(block_model(Spelling(router="biased-epsilon", broken="negative-epsilon"))).report
    assert not broken.applied and broken.declined


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("target", ["cpu@1.31", "auto"])
def test_weights_that_do_not_add_up_to_one_multiply_the_output_where_the_kernel_forgets_it(rank, dtype, target):
    how = Spelling(router="softmax-topk", rank=rank, dtype=dtype)
    forgets = Target.parse(target).version < (1, 32)
    model = fused(how, target=target)
    assert attributes(model)["normalize_routing_weights"] == int(forgets)
    assert ("ReduceSum" in operators(model)) == forgets


def test_a_block_is_right_where_nothing_else_keeps_its_input():
    """ONNX Runtime may write the output over the input; a proof, which feeds the input, cannot see that."""
    how = Spelling(router="softmax-topk", hidden=16, inter=16)
    model = block_model(how)
    rename(model, "x", "doubled")
    model.graph.node.insert(0, helper.make_node("Add", ["x", "x"], ["doubled"]))
    model = onnx.shape_inference.infer_shapes(model)
    result = fuse(model)
    assert result.report.applied == {FUSE: 1}
    expected, actual = (OrtRuntime().run(m, feeds(how))["y"] for m in (model, result.model))
    assert relative(expected, actual) < 1e-5


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("bias", [False, True])
def test_a_block_straight_behind_a_linear(combine, bias):
    how = Spelling(combine=combine)
    model = block_model(how)
    rename(model, "x", "hidden")
    weight = np.eye(how.hidden, dtype=np.float32) + 0.1
    model.graph.initializer.append(numpy_helper.from_array(weight, "before"))
    model.graph.initializer.append(numpy_helper.from_array(np.ones(how.hidden, np.float32), "before_bias"))
    model.graph.node.insert(0, helper.make_node("Gemm", ["x", "before", *["before_bias"] * bias], ["hidden"]))
    result = fuse(model)
    assert result.report.applied == {FUSE: 1}, result.report.declined
    expected, actual = (OrtRuntime().run(m, feeds(how))["y"] for m in (model, result.model))
    assert relative(expected, actual) < 1e-5


def test_a_sum_of_halves_in_float32_is_part_of_the_block():
    model = block_model(Spelling(combine="chosen", dtype="float16"))
    (sum_,) = (n for n in model.graph.node if n.op_type == "ReduceSum" and n.output[0] == model.graph.node[-1].input[0])
    summed, wide, total = sum_.output[0], "wide", "total"
    at = list(model.graph.node).index(sum_)
    model.graph.node.insert(at, helper.make_node("Cast", [sum_.input[0]], [wide], to=1))
    model.graph.node.insert(at + 2, helper.make_node("Cast", [total], [summed], to=10))
    sum_.input[0], sum_.output[0] = wide, total
    result = fuse(model)
    assert result.report.applied == {FUSE: 1}, result.report.declined
    assert operators(result.model) == {"MatMul": 1, "MoE": 1, "Identity": 1}


@pytest.mark.parametrize(
    ("combine", "old", "new"), [("mask-sum", "Equal", "Less"), ("chosen", "ReduceSum", "ReduceMean")]
)
@pytest.mark.parametrize("bias", [False, True])
def test_a_choice_that_is_used_in_another_way_says_how(combine, old, new, bias):
    model = block_model(Spelling(combine=combine, bias=bias, router="topk-softmax"))
    for node in model.graph.node:
        node.op_type = new if node.op_type == old else node.op_type
    before = operators(model)
    report = fuse(model).report
    reason = f"the experts of this router stay apart: how {new} uses its choice is not understood"
    assert [found for _, found in report.declined] == [reason]
    assert not report.applied and operators(model) == before


EXPERT = (
    "m{0} = Equal(i, e{0}) c{0} = Cast<to=1>(m{0}) h{0} = MatMul(x, u{0}) a{0} = Relu(h{0}) o{0} = MatMul(a{0}, d{0})"
)
SWITCH = f"""
    l = MatMul(x, r) p = Softmax<axis=-1>(l) i = ArgMax<axis=-1, keepdims=1>(p)
    {EXPERT.format(0)} {EXPERT.format(1)} s0 = Mul(c0, o0) s1 = Mul(c1, o1) s = Add(s0, s1)
"""


@pytest.mark.parametrize(
    ("rest", "reasons"),
    [
        ("w = ReduceMean(s, axis) y = Mul(s, w)", []),  # what follows the sum is no part of the block
        ("w = ReduceMax(p, axis) y = Mul(s, w)", []),
        (  # a second choice among what the first has left, as NLLB's and Phi-3.5's, is of the same router
            "w = ReduceMax(p, axis) n = ScatterElements<axis=-1>(p, i, w) j = ArgMax<axis=-1, keepdims=1>(n)"
            " k = Cast<to=1>(j) t = Mul(o0, k) y = Add(s, t)",
            ["'o0' inside of the block is also read by Mul"],
        ),
        ("k = Cast<to=1>(i) y = Mul(x, k)", None),
    ],
)
def test_a_choice_by_argmax_counts_its_expert(rest, reasons):
    whole = reasons is not None
    if not whole:  # the choice without its experts
        rest = SWITCH[: SWITCH.index("m0 =")] + rest
    sizes = {"r": (8, 2), "u0": (8, 4), "u1": (8, 4), "d0": (4, 8), "d1": (4, 8)}
    rng = np.random.default_rng(0)
    held = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in sizes.items()}
    held |= {"e0": np.array(0), "e1": np.array(1), "axis": np.array([-1])}
    text = f"g (float[T,8] x) => (float[T,8] y) {{ {rest if not whole else SWITCH + rest} }}"
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {text}')
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in held.items())
    result = fuse(model)
    assert [reason for _, reason in result.report.declined] == (reasons or [])
    assert result.report.applied == ({FUSE: 1} if reasons == [] else {})
    if reasons == []:
        x = {"x": rng.standard_normal((9, 8)).astype(np.float32)}
        before, after = (OrtRuntime().run(m, x)["y"] for m in (model, result.model))
        assert relative(before, after) < 1e-5


LARGEST = f"""
    l = MatMul(x, r) p = Softmax<axis=-1>(l) i = ArgMax<axis=-1, keepdims=KEEP>(p) w = ReduceMax<keepdims=KEEP>(p, axis)
    {EXPERT.format(0)} {EXPERT.format(1)}
    v0 = Mul(c0, w) v1 = Mul(c1, w) WIDE s0 = Mul(w0, o0) s1 = Mul(w1, o1) y = Add(s0, s1)
"""
WIDE = {
    1: "w0 = Identity(v0) w1 = Identity(v1)",
    0: "w0 = Unsqueeze(v0, axis) w1 = Unsqueeze(v1, axis)",
}


def largest(keep, **attributes):
    """Switch's router: the expert of the largest probability, times that probability."""
    sizes = {"r": (8, 2), "u0": (8, 4), "u1": (8, 4), "d0": (4, 8), "d1": (4, 8)}
    rng = np.random.default_rng(0)
    held = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in sizes.items()}
    held |= {"e0": np.array(0), "e1": np.array(1), "axis": np.array([-1])}
    text = LARGEST.replace("KEEP", str(keep)).replace("WIDE", WIDE[keep])
    text = f"g (float[T,8] x) => (float[T,8] y) {{ {text} }}"
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {text}')
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in held.items())
    (chosen,) = (node for node in model.graph.node if node.op_type == "ArgMax")
    chosen.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    return model


@pytest.mark.parametrize("keep", [0, 1])
def test_a_choice_by_argmax_is_a_choice_of_one(keep):
    model = largest(keep)
    result = fuse(model)
    assert result.report.applied == {FUSE: 1}, result.report.declined
    how = Spelling()
    expected, actual = (OrtRuntime().run(m, feeds(how))["y"] for m in (model, result.model))
    assert relative(expected, actual) < 1e-5


def test_an_argmax_that_takes_the_last_of_equals_declines():
    (reason,) = (found for _, found in fuse(largest(1, select_last_index=1)).report.declined)
    assert "ArgMax takes the last of equal scores" in reason


def test_a_softplus_that_may_be_negative_declines():
    assert_declines(Spelling(router="softplus-large", broken="low-threshold"), "no softmax")


@pytest.mark.parametrize("rank", [2, 3])
def test_a_softmax_over_scattered_logits_is_one_over_the_chosen(rank):
    model = fused(Spelling(router="raw", combine="scatter-softmax", rank=rank))
    flattened = {"Reshape": 1} if rank == 3 else {}
    assert operators(model) == {"MatMul": 1, "MoE": 1, "Identity": 1, **flattened}


@pytest.mark.parametrize("broken", ["zero-seed", "added", "softmax-axis"])
def test_a_softmax_that_is_none_over_the_chosen_declines(broken):
    report = fuse(block_model(Spelling(router="raw", combine="scatter-softmax", broken=broken))).report
    assert not report.applied and len(report.declined) == 1


def test_a_contraction_over_the_tokens_declines():
    report = fuse(block_model(Spelling(combine="chosen-einsum-sum", broken="sum-axis"))).report
    assert not report.applied and report.declined


def test_experts_that_a_trace_found_hit_say_so():
    model = onnx.load(MODELS / "hf_blocks/qwen3_moe__eager__ts17.onnx")
    reason = "the trace fixed how many experts a token can reach: NonZero lists those that were hit"
    assert [found for _, found in fuse(model).report.declined] == [reason]


def test_a_choice_without_experts_is_not_its_business():
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[T,8] x) => (float[T,2] v, int64[T,2] i)'
        " <int64[1] k = {2}> { v, i = TopK(x, k) }"
    )
    assert not fuse(model).report.declined


def rename(model, old, new):
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]


def test_weights_that_are_given_of_no_tokens():
    """The output is reshaped to extents of which one is 0."""
    model = fused(Spelling(router="biased", combine="mask-sum", rank=3))
    assert OrtRuntime().run(model, {"x": np.zeros((2, 0, 8), np.float32)})["y"].shape == (2, 0, 8)
