"""unstack: every static selection of one expert becomes a weight of its own; nothing else does."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from support import histogram, parse, run, snapshot

import rewriter
from rewriter.testing import check_model, check_rule, moe_models, unrolled_experts

X = np.linspace(-1, 1, 6, dtype=np.float32).reshape(3, 2)
STACK = (
    "<float[2,2,2] W = {0,1,2,3,4,5,6,7}, int64 zero = {0}, int64 one = {1}, int64[1] ones = {1}, int64[1] zeros = {0}>"
)


def unrolled(body, inputs="float[3,2] x", outputs="float[3,2] y", constants=STACK):
    return parse(f"g ({inputs}) => ({outputs}) {constants} {{ {body} }}")


def weights(model):
    return [name for name in model.graph.initializers if name[0] in "VW"]


MOBIUS = """
    a = Gather (W, zeros)  b = Squeeze (a, zeros)  c = Transpose (b)  p = MatMul (x, c)
    d = Gather (W, ones)   e = Squeeze (d, zeros)  f = Transpose (e)  q = MatMul (p, f)
    y = Add (p, q)
"""


def test_fires():
    result = rewriter.apply(unrolled(MOBIUS), ["unstack"])
    assert result.report.applied == {"unstack": 2} and not result.report.declines
    assert histogram(result.model) == {"MatMul": 2, "Add": 1}
    assert weights(result.model) == ["W__slice_0__T", "W__slice_1__T"]


def test_agrees():
    model = unrolled(MOBIUS)
    result = rewriter.apply(model, ["unstack"])
    np.testing.assert_array_equal(run(result.model, {"x": X})["y"], run(model, {"x": X})["y"])


SPELLINGS = {
    "W[e]": ("w = Gather (W, one) y = MatMul (x, w)", "W__slice_1"),
    "W[e].T": ("a = Gather (W, one) w = Transpose <perm = [1, 0]> (a) y = MatMul (x, w)", "W__slice_1__T"),
    "slice, rank 3": (
        "a = Slice (W, ones, two, zeros) w = Transpose <perm = [0, 2, 1]> (a) u = Unsqueeze (x, zeros)"
        " z = MatMul (u, w) y = Squeeze (z, zeros)",
        "W__slice_1__T",
    ),
    "split": ("a, b = Split <num_outputs = 2> (W) w = Squeeze (b, zeros) y = MatMul (x, w)", "W__slice_1"),
    "gemm": ("w = Gather (W, one) y = Gemm <transB = 1> (x, w)", "W__slice_1"),
    "computed index": (
        "n = Constant <value_ints = [1]> () i = Identity (n) r = Reshape (i, none) k = Cast <to = 7> (r)"
        " w = Gather (W, k) y = MatMul (x, w)",
        "W__slice_1",
    ),
    "a sequence": ("s = SplitToSequence <keepdims = 0> (W) w = SequenceAt (s, one) y = MatMul (x, w)", "W__slice_1"),
    "a Constant": (
        "V = Constant <value = float[2,2,2] {0,1,2,3,4,5,6,7}> () w = Gather (V, one) y = MatMul (x, w)",
        "V__slice_1",
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(spelling):
    body, name = SPELLINGS[spelling]
    constants = STACK.replace(">", ", int64[1] two = {2}, int64[0] none = {}>")
    model = unrolled(body, constants=constants)
    result = rewriter.apply(model, ["unstack"])
    assert result.report.applied == {"unstack": 1} and not result.report.declines
    assert weights(result.model) == (["W"] if name.startswith("V") else []) + [name]
    np.testing.assert_array_equal(run(result.model, {"x": X})["y"], run(model, {"x": X})["y"])


READ_WHOLE = "w = Gather (W, one) p = MatMul (x, w) m = ReduceMax <keepdims = 0> (W) y = Add (p, m)"
DECLINES = {
    "dynamic index": ("w = Gather (W, i) y = MatMul (x, w)", {"the index depends on an input"}),
    "read whole": (READ_WHOLE, {"'W' is still read whole, so its slices would be copies"}),
    "read whole by a dynamic index": (
        "w = Gather (W, one) p = MatMul (x, w) v = Gather (W, i) q = MatMul (x, v) y = Add (p, q)",
        {"'W' is still read whole, so its slices would be copies", "the index depends on an input"},
    ),
    "more than the stack": (
        "a = Gather (W, zero) p = MatMul (x, a) b = Transpose (a) q = MatMul (x, b)"
        " c = Gather (W, one) r = MatMul (x, c)"
        " d = Transpose (c) s = MatMul (x, d) t = Add (p, q) u = Add (r, s) y = Add (t, u)",
        {"the slices of 'W' take 64 bytes where it takes 32"},
    ),
    "uneven indices": (
        "j = Constant <value_ints = [1, 0, 0]> () w = Gather (W, j) v = ReduceMax <keepdims = 0> (w) y = Add (x, v)",
        {"the indices do not step evenly"},
    ),
}


@pytest.mark.parametrize("case", DECLINES)
def test_declines(case):
    body, reasons = DECLINES[case]
    model = unrolled(body, inputs="float[3,2] x, int64 i")
    before = snapshot(model)
    result = rewriter.apply(model, ["unstack"])
    assert {d.reason for d in result.report.declines} == reasons
    assert not result.report.applications
    assert snapshot(result.model) == before


@pytest.mark.parametrize(
    "chain",
    [
        "w = Gather (W, one) v = Cast <to = 1> (w)",
        "w = Cast <to = 1> (W) v = Gather (w, one)",
        "w = Gather (W, one) c = Cast <to = 1> (w) v = Transpose (c)",
        "c = Cast <to = 1> (W) s, t = Split <num_outputs = 2> (c) v = Squeeze (t, zeros)",
    ],
)
def test_a_slice_that_is_widened_is_stored_narrow(chain):
    model = unrolled(f"{chain} y = MatMul (x, v)", constants=STACK.replace("float[2,2,2]", "float16[2,2,2]"))
    result = rewriter.apply(model, ["unstack"])
    assert result.report.applied == {"unstack": 1} and not result.report.declines
    assert histogram(result.model) == {"Cast": 1, "MatMul": 1}
    (name,) = weights(result.model)
    weight = result.model.graph.initializers[name]
    assert name.startswith("W__slice_1") and weight.const_value.dtype == ir.DataType.FLOAT16
    np.testing.assert_array_equal(run(result.model, {"x": X})["y"], run(model, {"x": X})["y"])


def test_a_constant_that_is_read_turned_and_as_it_is_is_no_stack():
    """As an embedding that an output projection reads transposed."""
    whole = "m = ReduceMax <keepdims = 0> (W) n = ReduceMax <keepdims = 0> (v) a = Add (x, m) y = Add (a, n)"
    report = rewriter.apply(unrolled(f"v = Transpose (W) {whole}"), ["unstack"]).report
    assert not report.applications and not report.declines


def test_what_a_caller_may_override_is_left_alone():
    model = unrolled("w = Gather (W, one) y = MatMul (x, w)", inputs="float[3,2] x, float[2,2,2] W")
    assert not rewriter.apply(model, ["unstack"]).report.applications


def test_small_integers_and_scalars_are_no_stacks():
    body = "s = Shape (x) d = Gather (s, zero) u = Unsqueeze (d, zeros) m = Constant <value_ints = [-1]> ()"
    model = unrolled(f"{body} c = Concat <axis = 0> (u, m) y = Reshape (x, c)")
    report = rewriter.apply(model, ["unstack"]).report
    assert not report.applications and not report.declines


def test_idempotent():
    once = rewriter.apply(unrolled(MOBIUS), ["unstack"]).model
    assert not rewriter.apply(once, ["unstack"]).report.applications


def test_a_shared_selection_is_one_weight():
    body = "w = Gather (W, one) p = MatMul (x, w) v = Gather (W, one) q = MatMul (p, v) y = MatMul (q, w)"
    result = rewriter.apply(unrolled(body), ["unstack"])
    assert weights(result.model) == ["W__slice_1"]
    assert histogram(result.model) == {"MatMul": 3}


def test_a_graph_output_in_the_middle_keeps_its_name():
    body = "a = Gather (W, one) w = Transpose (a) y = MatMul (x, w)"
    model = unrolled(body, outputs="float[3,2] y, float[2,2] a")
    result = rewriter.apply(model, ["unstack"])
    assert [value.name for value in result.model.graph.outputs] == ["y", "a"]
    expected, actual = run(model, {"x": X}), run(result.model, {"x": X})
    for name in ("y", "a"):
        np.testing.assert_array_equal(actual[name], expected[name])


def test_in_bodies_and_in_functions():
    text = """
        g (float[3,2] x, bool c) => (float[3,2] y) <float[2,2,2] W = {0,1,2,3,4,5,6,7}, int64 one = {1}> {
           z = local.Expert (x)
           y = If (c) <then_branch = t () => (float[3,2] u) { w = Gather (W, one) u = MatMul (z, w) },
                       else_branch = e () => (float[3,2] u) <int64 zero = {0}> {
                          w = Gather (W, zero) u = MatMul (z, w) }>
        }"""
    function = """
        <domain: "local", opset_import: ["" : 21]>
        Expert (x) => (y) { V = Constant <value = float[2,2,2] {0,1,2,3,4,5,6,7}> () i = Constant <value_int = 1> ()
                            w = Gather (V, i) y = MatMul (x, w) }"""
    model = parse(text, functions=function, domains=', "local" : 1')
    result = rewriter.apply(model, ["unstack"])
    assert result.report.applied == {"unstack": 3}
    assert set(result.model.graph.initializers) == {"W__slice_0", "W__slice_1"}
    for taken in (True, False):
        feeds = {"x": X, "c": np.array(taken)}
        np.testing.assert_array_equal(run(result.model, feeds)["y"], run(model, feeds)["y"])


def test_weights_are_not_read_before_they_are_written():
    def never():
        raise AssertionError("a weight was read")

    model = unrolled(MOBIUS)
    model.graph.initializers["W"].const_value = ir.LazyTensor(
        never, dtype=ir.DataType.FLOAT, shape=ir.Shape((2, 2, 2)), name="W"
    )
    result = rewriter.apply(model, ["unstack"], overrides={"parity.local": "none"})
    assert result.report.applied == {"unstack": 2}


@given(moe_models(max_size=8))
def test_a_whole_unroll_leaves_no_selection(model):
    report = check_model("unstack", model)
    result = rewriter.apply(model, ["unstack"])
    assert report.applications and not report.declines
    stacks = [v for v in result.model.graph.initializers.values() if v.shape is not None and len(v.shape) == 3]
    assert not stacks


def test_holds_on_whatever_is_drawn():
    check_rule("unstack", unrolled_experts(max_size=12))


def test_a_slice_that_an_identity_names_for_the_caller_is_not_stored_beside_its_stack():
    report = check_model(
        "unstack",
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[T,2] x) => (float[T,2] y, float[2,2] seen) <float[2,2,2] W = {1,2,3,4,5,6,7,8}, int64 e = {0}> {
           m = Gather (W, e)
           seen = Identity (m)
           n = Gather (W, e)
           a = MatMul (x, seen)
           b = MatMul (x, n)
           y = Add (a, b)
        }""",
    )
    assert report.applied == {"unstack": 2}
