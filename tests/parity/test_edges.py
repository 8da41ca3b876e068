"""Wrong rules that one kind of input shows: no rows, ties, negative indices, numbers beyond a clamp, infinite ones."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnxscript.rewriter import RewriteRuleClassBase
from support import parse

import rewriter
from rewriter.parity import proof
from rewriter.parity.edges import Variation, floats_at_edges, lacks_rows


def constant(op, array, name):
    return op.initializer(ir.tensor(np.array(array), name=name))


class NoRows(RewriteRuleClassBase):
    """Relu -> itself, by way of a shape that no rows leave open."""

    model = "g (float[t, 3] x) => (float[t, 3] y) { y = Relu(x) }"

    def pattern(self, op, x):
        return op.Relu(x)

    def rewrite(self, op, x):
        return op.Reshape(op.Max(x, op.Sub(x, x)), constant(op, [0, -1], "shape"))


class NoClamp(RewriteRuleClassBase):
    """A product, clamped -> the product."""

    model = """g (float[t, 3] x) => (float[t, 4] y) <float[3, 4] w = {
        1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0}, float low = {-7}, float high = {7}>
        { h = MatMul(x, w) y = Clip(h, low, high) }"""

    def pattern(self, op, x, w, low, high):
        return op.Clip(op.MatMul(x, w), low, high)

    def rewrite(self, op, x, w, low, high):
        return op.MatMul(x, w)


class LastOfTies(RewriteRuleClassBase):
    """The largest numbers -> the same, but of equal ones the last."""

    model = """g (float[t, 8] x) => (int64[t, 2] i) <int64[1] k = {2}> { v, i = TopK(x, k) }"""

    def pattern(self, op, x, k):
        _, indices = op.TopK(x, k, _outputs=2)
        return indices

    def rewrite(self, op, x, k):
        turned = op.Gather(x, constant(op, np.arange(7, -1, -1), "turned"), axis=1)
        _, indices = op.TopK(turned, k, _outputs=2)
        return op.Sub(constant(op, 7, "last"), indices)


class FromTheStart(RewriteRuleClassBase):
    """Rows of a table by number -> by what is left of it without its sign."""

    model = """g (int64[t] i) => (float[t, 2] y) <float[4, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}> { y = Gather(w, i) }"""

    def pattern(self, op, w, i):
        return op.Gather(w, i)

    def rewrite(self, op, w, i):
        return op.Gather(w, op.Abs(i))


class NoughtsAndOnes(RewriteRuleClassBase):
    """A product of integers -> the smaller one."""

    model = "g (int64[t] i, int64[t] j) => (int64[t] y) { y = Mul(i, j) }"

    def pattern(self, op, i, j):
        return op.Mul(i, j)

    def rewrite(self, op, i, j):
        return op.Min(i, j)


class MinusInfinity(RewriteRuleClassBase):
    """Softmax -> itself, without a weight of 0."""

    model = "g (float[t, 4] x) => (float[t, 4] y) { y = Softmax(x) }"

    def pattern(self, op, x):
        return op.Softmax(x)

    def rewrite(self, op, x):
        return op.Softmax(op.Max(x, constant(op, np.float32(-6), "least")))


WRONG = (NoRows, NoClamp, LastOfTies, FromTheStart, NoughtsAndOnes, MinusInfinity)


def failed(rule):
    return [d.reason for d in rewriter.apply(parse(rule.model), [rule()]).report.declines if d.failed]


@pytest.mark.parametrize("rule", WRONG)
def test_a_rule_that_one_kind_of_input_shows_is_found_by_it_alone(rule, monkeypatch):
    assert failed(rule)
    monkeypatch.setattr(proof, "variations", lambda *_: [Variation(1), Variation(17)])
    assert not failed(rule)


class PlusInfinity(RewriteRuleClassBase):
    """Sigmoid -> x over itself and one, in exponentials: no number where they overflow."""

    def pattern(self, op, x):
        return op.Sigmoid(x)

    def rewrite(self, op, x):
        exponential = op.Exp(x)
        return op.Div(exponential, op.Add(exponential, constant(op, np.float32(1), "one")))


def test_infinite_scores_are_fed_where_an_operator_takes_them():
    model = parse("g (float[t, 4] x) => (float[t, 4] y) { y = Sigmoid(x) }")
    (decline,) = rewriter.apply(model, [PlusInfinity()]).report.declines
    assert decline.failed and "differs by inf" in decline.reason


class Defined(RewriteRuleClassBase):
    """Softmax -> itself, and zeros where Softmax of an infinite number is none."""

    def pattern(self, op, x):
        return op.Softmax(x)

    def rewrite(self, op, x):
        last = constant(op, [-1], "last")
        exponential = op.Exp(op.Sub(x, op.ReduceMax(x, last)))
        right = op.Div(exponential, op.ReduceSum(exponential, last))
        return op.Where(op.IsNaN(right), constant(op, np.float32(0), "zero"), right)


def test_what_the_original_gives_no_number_for_may_be_any():
    model = parse("g (float[t, 4] x) => (float[t, 4] y) { y = Softmax(x) }")
    assert len(rewriter.apply(model, [Defined()], strict=True).report.applications) == 1


def test_rows_are_of_the_edge_and_of_others():
    drawn = np.arange(1, 13, dtype=np.float32).reshape(4, 3)
    how = Variation(4, -np.inf, 10.0, ties=True)
    plain = floats_at_edges(drawn.copy(), how, logits=False)
    assert not plain[:2].any() and np.array_equal(plain[2:], drawn[2:] * 10)
    scores = floats_at_edges(drawn.copy(), how, logits=True)
    assert not scores[:2].any() and np.isneginf(scores[2:, 0]).all() and np.array_equal(scores[2:, 1:], drawn[2:, 1:])
    assert floats_at_edges(drawn.copy(), Variation(4, -np.inf), logits=False).all()


@pytest.mark.parametrize(("shape", "lacks"), [((0, 0, 4), False), ((0, 1, 4), True), ((1, 1, 4), False)])
def test_an_array_of_nothing_may_break_the_shape_that_is_declared(shape, lacks):
    x, y = (ir.val(name, ir.DataType.FLOAT, ["b", "s", 4]) for name in "xy")
    assert lacks_rows(y, np.zeros(shape, np.float32), [x]) is lacks
    assert not lacks_rows(ir.val("y", ir.DataType.FLOAT, ["n", "m", 4]), np.zeros(shape, np.float32), [x])
