"""near_misses: it catches a rule whose guard was dropped, and says which fact gave it away."""

from __future__ import annotations

import sys

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from support import Swap

from rewriter.rule import Declined, NotApplicable, Rule
from rewriter.tensors import View
from rewriter.testing import check_model, check_rule, moe_models, near_misses, projections, unrolled_experts
from rewriter.testing.change.mutations import RefusedError

FEW = settings(max_examples=40, deadline=None, derandomize=True, database=None)
SHORT = settings(max_examples=5, derandomize=True, database=None, deadline=None)


def drawn(text):
    """Always the same model."""
    return st.builds(lambda: ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}'))


class SoftmaxToExp(Rule):
    """Softmax(x) -> Exp(LogSoftmax(x)), over the last axis."""

    guarded = True

    def pattern(self, op, x):
        return op.Softmax(x, _outputs=["y"])

    def rewrite(self, op, x, y):
        axis = y.producer().attributes.get_int("axis", -1)
        if self.guarded and axis not in (-1, 1):
            raise Declined(f"axis is {axis}", y)
        return op.Exp(op.LogSoftmax(x, axis=-1))


class GemmToMatMul(Rule):
    """Gemm(x, w) -> MatMul(x, w), where no attribute says anything else."""

    guarded = True

    def pattern(self, op, x, w):
        return op.Gemm(x, w, _outputs=["y"])

    def rewrite(self, op, x, w, y):
        attributes = y.producer().attributes
        plain = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
        for name in plain if self.guarded else ("transA", "transB"):
            if name in attributes and attributes[name].value != plain[name]:
                raise Declined(f"{name} is {attributes[name].value}", y)
        return op.MatMul(x, w)


class AbsOfRelu(Rule):
    """Relu(x), read by Abs only -> what reads the Abs reads a Max(x, 0)."""

    guarded = True

    def pattern(self, op, x):
        return op.Relu(x, _outputs=["y"])

    def rewrite(self, op, x, y):
        readers = y.consumers()
        if self.guarded and (y.is_graph_output() or any(reader.op_type != "Abs" for reader in readers)):
            raise Declined("it is read by more than Abs", y)
        zero = op.Sub(x, x)
        return {reader.outputs[0]: op.Max(x, zero) for reader in readers}


class AddZero(Rule):
    """Add(x, 0) -> x."""

    guarded = True

    def pattern(self, op, x, c):
        return op.Add(x, c)

    def rewrite(self, op, x, c):
        known = self.run.facts.get(c, View) if self.guarded else c.const_value
        if known is None or known.size != 1 or known.numpy().any():
            raise NotApplicable
        return op.Identity(x)


RULES = {
    "axis": (SoftmaxToExp, "g (float[3,3] x) => (float[3,3] y) { [s] y = Softmax (x) }"),
    "attribute": (GemmToMatMul, "g (float[3,3] x, float[3,3] w) => (float[3,3] y) { [m] y = Gemm (x, w) }"),
    "other reader": (AbsOfRelu, "g (float[3] x) => (float[3] y) { [r] a = Relu (x) [b] y = Abs (a) }"),
    "overridable": (AddZero, "g (float[3] x) => (float[3] y) <float c = {0}> { [a] y = Add (x, c) }"),
}
FACTS = {
    "axis": "near miss: Softmax node 's': axis 0 added",
    "attribute": "near miss: Gemm node 'm': alpha 3.0 added",
    "other reader": "near miss: value 'a': another reader",
    "overridable": "near miss: constant 'c': also a graph input, so that a caller may override it",
}


@pytest.mark.parametrize("guard", RULES)
def test_a_rule_with_its_guard_passes(guard):
    rule, text = RULES[guard]
    near_misses(rule(name="guarded"), drawn(text), settings=FEW)


@pytest.mark.parametrize("guard", RULES)
def test_a_rule_without_its_guard_is_caught(guard):
    rule, text = RULES[guard]
    wrong = type("Wrong", (rule,), {"guarded": False})(name="wrong")
    check_rule(wrong, drawn(text), settings=SHORT)  # which sees nothing of it
    with pytest.raises(AssertionError) as caught:
        near_misses(wrong, drawn(text), settings=FEW)
    fact, what, *text = str(caught.value).splitlines()
    assert fact == FACTS[guard]
    assert what.startswith("wrong: ")
    with pytest.raises(AssertionError, match=r"^wrong: "):
        check_model(wrong, "\n".join(text[text.index("<") :]))  # what is printed can be pasted


class QuickGeluToMul(Rule):
    """QuickGelu(x) -> x * Sigmoid(alpha * x)."""

    guarded = True

    def pattern(self, op, x):
        return op.QuickGelu(x, _domain="com.microsoft", _outputs=["y"])

    def rewrite(self, op, x, y):
        alpha = y.producer().attributes.get_float("alpha", 1.702)
        factor = op.initializer(ir.tensor(np.float32(alpha if self.guarded else 1.0), name="alpha"))
        return op.Mul(x, op.Sigmoid(op.Mul(x, factor)))


QUICK_GELU = st.builds(
    lambda: ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'
        " g (float[3] x) => (float[3] y) { [q] y = com.microsoft.QuickGelu <alpha = 1.0> (x) }"
    )
)


def test_an_operator_that_only_the_runtime_has():
    near_misses(QuickGeluToMul(name="right"), QUICK_GELU, settings=FEW)
    wrong = type("Wrong", (QuickGeluToMul,), {"guarded": False})(name="wrong")
    with pytest.raises(AssertionError, match=r"^near miss: QuickGelu node 'q': alpha"):
        near_misses(wrong, QUICK_GELU, settings=FEW)


def test_where_nothing_near_runs_the_last_refusal_is_told(monkeypatch):
    def refuses(changed, original):
        raise RefusedError("it is not\nto be had")

    monkeypatch.setattr(sys.modules[near_misses.__module__], "require_runnable", refuses)
    rule, text = RULES["axis"]
    with pytest.raises(
        AssertionError, match=r"guarded: the runtime refuses .* fires; the last, .*: it is not to be had$"
    ):
        near_misses(rule(name="guarded"), drawn(text), settings=SHORT)


def test_a_rule_that_never_fires_is_not_shown_to_be_right():
    with pytest.raises(AssertionError, match="softmax fired on none of the drawn models"):
        near_misses(SoftmaxToExp(name="softmax"), drawn(RULES["overridable"][1]), settings=SHORT)


def test_a_rule_that_is_wrong_as_it_is_fails_at_once():
    with pytest.raises(AssertionError, match=r"^wrong: it failed its parity"):
        near_misses(Swap("Relu", "Abs", name="wrong"), drawn(RULES["other reader"][1]), settings=SHORT)


PLAIN = {"placements": ["main", "function"], "dtypes": ["float32"], "max_size": 6}
SHIPPED = {
    "unstack": unrolled_experts(**PLAIN, obstacles=[], repeats=False),
    "matmul-to-matmul-nbits": projections(**PLAIN, consumers=["matmul"]),
    "fuse-experts": moe_models(**PLAIN, max_experts=2, max_layers=1, routers=["softmax-topk"], selections=["gather"]),
}


@pytest.mark.parametrize("rule", SHIPPED)
def test_the_shipped_rules_pass(rule):
    near_misses(rule, SHIPPED[rule], settings=SHORT)


SHARED_STACK = """
<ir_version: 10, opset_import: ["" : 21]>
moe (float[T,1] x) => (float[T,1] y) <
  float[1,2] router = {0.25, 0.5}, float[2,1,1] gate = {-0.75, -1.5}, float[2,1,1] down = {2, -2},
  int64[1] k = {1}, int64[1] last = {-1}, int64 e0 = {0}, int64 e1 = {1}, int64[1] i0 = {0}, int64[1] i1 = {1}
> {
  logits = MatMul (x, router)
  scores = Softmax <axis = -1> (logits)
  weights, chosen = TopK (scores, k)
  g0 = Gather (gate, e0)  a0 = MatMul (x, g0)  s0 = Sigmoid (a0)  b0 = Mul (a0, s0)  u0 = Gather (up, e0)
  t0 = MatMul (x, u0)  c0 = Mul (b0, t0)
  d0 = Gather (down, e0)  o0 = MatMul (c0, d0)
  is0 = Equal (chosen, i0)  f0 = Cast <to = 1> (is0)  w0 = Mul (weights, f0)  m0 = ReduceSum <keepdims = 1> (w0, last)
  y0 = Mul (o0, m0)
  g1 = Gather (gate, e1)  a1 = MatMul (x, g1)  s1 = Sigmoid (a1)  b1 = Mul (a1, s1)  u1 = Gather (up, e1)
  t1 = MatMul (x, u1)  c1 = Mul (b1, t1)
  d1 = Gather (down, e1)  o1 = MatMul (c1, d1)
  is1 = Equal (chosen, i1)  f1 = Cast <to = 1> (is1)  w1 = Mul (weights, f1)  m1 = ReduceSum <keepdims = 1> (w1, last)
  y1 = Mul (o1, m1)
  y = Add (y0, y1)
}
"""
"""What near_misses found: moe_models with one stack in another's place."""


@pytest.mark.parametrize("shared", ["gate", "down"])
def test_experts_that_share_a_stack_stay(shared):
    text = SHARED_STACK.replace("up,", f"{shared},")
    (decline,) = check_model("fuse-experts", text).declines
    assert decline.reason == "two of gate, up and down are one weight, which fc1 would hold once more"


def test_a_cast_that_goes_with_a_constant_copies_nothing():
    """What near_misses found: a stack in float16 behind a Cast, which the rule stores in float32."""
    stacks = "float16[2,1,1] half = {15360, 16384}, float[2,1,1] up = {1, 2}"
    text = SHARED_STACK.replace("float[2,1,1] gate = {-0.75, -1.5}", stacks)
    text = text.replace("  logits =", "  gate = Cast <to = 1> (half)\n  logits =")
    assert check_model("fuse-experts", text).applied == {"fuse-experts": 1}
