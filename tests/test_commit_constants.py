"""What a commit does with constants: each equal one once, each dead one gone, none of the given model's renamed."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import RewriteRuleClassBase
from support import Constant, histogram, parse, run, snapshot

import rewriter
from rewriter.tensors import View, ViewTensor

X = np.linspace(-2, 2, 6, dtype=np.float32).reshape(2, 3)


def apply(model, *rules):
    return rewriter.apply(model, list(rules), overrides={"parity.local": "none"})


TWO = "g (float[2,3] x) => (float[2,3] y) { a = Relu (x) y = Relu (a) }"


def fresh():
    return ir.tensor(np.full((2, 3), 2, np.float32), name="c")


def test_new_constants_never_overwrite_one_another():
    numbers = itertools.count(1)
    result = apply(parse(TWO), Constant(lambda: ir.tensor(np.full((2, 3), next(numbers), np.float32), name="c")))
    assert len(result.model.graph.initializers) == 2
    np.testing.assert_array_equal(run(result.model, {"x": X})["y"], X + 3)


def test_small_equal_constants_are_one():
    result = apply(parse(TWO), Constant(fresh))
    assert len(result.model.graph.initializers) == 1
    np.testing.assert_array_equal(run(result.model, {"x": X})["y"], X + 4)
    kinds = iter([np.float32(0.0), np.float32(-0.0)])
    result = apply(parse(TWO), Constant(lambda: ir.tensor(np.full((2, 3), next(kinds)), name="c")))
    assert len(result.model.graph.initializers) == 2, "equal numbers, other bytes"


def test_one_tensor_is_stored_once():
    one = fresh()
    result = apply(parse(TWO), Constant(lambda: one))
    assert len(result.model.graph.initializers) == 1
    np.testing.assert_array_equal(run(result.model, {"x": X})["y"], X + 4)


def test_equal_views_are_one_constant_and_others_are_not():
    source = ir.tensor(np.arange(12, dtype=np.float32).reshape(2, 2, 3), name="stack")
    whole = View.whole(source, "stack")
    expert = itertools.count()
    experts = (0, 0, 1)
    model = parse("g (float[2,3] x) => (float[2,3] y) { a = Relu (x) b = Relu (a) y = Relu (b) }")
    result = apply(model, Constant(lambda: ViewTensor(whole.index(0, experts[next(expert) % 3]))))
    assert len(result.model.graph.initializers) == 2
    expected = X + 2 * source.numpy()[0] + source.numpy()[1]
    np.testing.assert_array_equal(run(result.model, {"x": X})["y"], expected)


def test_a_view_of_all_of_a_stored_constant_is_that_constant():
    model = parse("g (float[2,3] x) => (float[2,3] y) <float[2,3] w = {1,2,3,4,5,6}> { a = Add (x, w) y = Relu (a) }")
    tensor = model.graph.initializers["w"].const_value
    for make in (lambda: ViewTensor(View.whole(tensor, "w")), lambda: tensor):
        before = snapshot(model)
        result = apply(model, Constant(make))
        assert len(result.model.graph.initializers) == 1
        assert snapshot(model) == before, "the given model's tensor was renamed"
        np.testing.assert_array_equal(run(result.model, {"x": X})["y"], X + 2 * tensor.numpy())


def test_a_constant_of_a_subgraph_may_be_used_elsewhere():
    model = parse("""
        g (float[2,3] x, bool c) => (float[2,3] y) {
           a = Relu (x)
           y = If (c) <then_branch = t () => (float[2,3] u) <float[2,3] w = {1,2,3,4,5,6}> { u = Add (a, w) },
                       else_branch = e () => (float[2,3] u) { u = Neg (a) }>
        }""")
    branch = next(node for node in model.graph if node.op_type == "If").attributes["then_branch"].as_graph()
    tensor = branch.initializers["w"].const_value
    before = snapshot(model)
    result = apply(model, Constant(lambda: tensor))
    assert snapshot(model) == before, "the given model's tensor was renamed"
    out = run(result.model, {"x": X, "c": np.array(True)})["y"]
    np.testing.assert_array_equal(out, X + 2 * tensor.numpy())


def test_what_became_dead_goes_and_nothing_else():
    model = parse("""
        g (float[2,3] x) => (float[2,3] y, float[2] z)
           <float[2,3] used = {1,2,3,4,5,6}, float[2,3] dead = {1,2,3,4,5,6},
            float[2] z = {1,2}, float[2] idle = {1,2}> {
           s = Add (used, dead)
           t = Mul (s, x)
           a = Relu (t)
           unread = Neg (used)
           y = Add (x, a)
        }""")

    class Cut(RewriteRuleClassBase):
        def pattern(self, op, x, a):
            return op.Add(x, op.Relu(a))

        def rewrite(self, op, x, a):
            return op.Identity(x)

    result = apply(model, Cut)
    assert histogram(result.model) == {"Identity": 1, "Neg": 1}
    assert set(result.model.graph.initializers) == {"used", "z", "idle"}


def test_a_constant_that_lost_its_last_reader_may_gain_another():
    class Undo(RewriteRuleClassBase):
        def pattern(self, op, x, c):
            return op.Neg(op.Add(x, c))

        def rewrite(self, op, x, c):
            return op.Identity(x)

    model = parse("g (float[2,3] x) => (float[2,3] y) { a = Relu (x) b = Neg (a) y = Relu (b) }")
    result = apply(model, Constant(fresh), Undo)
    assert histogram(result.model) == {"Identity": 1, "Add": 1} and len(result.model.graph.initializers) == 1
    np.testing.assert_array_equal(run(result.model, {"x": X})["y"], X + 2)


def test_a_dead_body_lets_go_of_what_it_captured():
    model = parse("""
        g (float[2,3] x, bool c) => (float[2,3] y) <float[2,3] w = {1,2,3,4,5,6}> {
           a = Neg (x)
           b = If (c) <then_branch = t () => (float[2,3] u) { u = Add (a, w) },
                       else_branch = e () => (float[2,3] u) { u = Neg (a) }>
           d = Relu (b)
           y = Add (x, d)
        }""")

    class Cut(RewriteRuleClassBase):
        def pattern(self, op, x, a):
            return op.Add(x, op.Relu(a))

        def rewrite(self, op, x, a):
            return op.Identity(x)

    result = apply(model, Cut)
    assert histogram(result.model) == {"Identity": 1}
    assert not result.model.graph.initializers
