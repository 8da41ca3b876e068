"""A proof of a class is more than its first member on one input: other members, other numbers of rows, each feature."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
from onnxscript.rewriter import RewriteRuleClassBase
from support import parse

import rewriter
from rewriter.parity.difference import relative
from rewriter.parity.local import LocalProver
from rewriter.ruleset import ParitySettings


class WrongFrom(RewriteRuleClassBase):
    """Relu -> itself; from some application on, its negative."""

    def __init__(self, first):
        super().__init__(name="relu")
        self._first = first
        self.built = 0

    def pattern(self, op, x):
        return op.Relu(x)

    def rewrite(self, op, x):
        right = op.Max(x, op.Sub(x, x))
        self.built += 1
        return right if self.built <= self._first else op.Neg(right)


def chain(nodes, rows="2"):
    body = " ".join(f"[n{i}] a{i + 1} = Relu(a{i}) [m{i}] b{i + 1} = Neg(a{i + 1})" for i in range(nodes))
    outputs = ", ".join(f"float[{rows},3] b{i + 1}" for i in range(nodes))
    return parse(f"g (float[{rows},3] a0) => ({outputs}) {{ {body} }}")


def failed(model, rule):
    return [decline.node for decline in rewriter.apply(model, [rule]).report.declines if decline.failed]


def test_a_rule_that_is_wrong_for_all_but_the_first_is_found():
    assert failed(chain(4), WrongFrom(1)) == ["n1", "n2", "n3"]


def test_one_that_is_right_passes():
    assert not failed(chain(4), WrongFrom(4))


def drawn(size, count=50):
    """Which members of a class are run besides the first, where each quantizes one weight of so many elements."""
    prover = LocalProver(ParitySettings())
    weight = SimpleNamespace(size=size)
    jobs = [SimpleNamespace(weight=weight, context=SimpleNamespace(weight=f"w{i}")) for i in range(count)]
    return [i for i, job in enumerate(jobs) if prover._is_drawn("class", SimpleNamespace(where=f"n{i}", jobs=[job]))]


def test_of_a_class_with_large_weights_as_many_are_run_as_may_be_loaded():
    small, large = drawn(1 << 10), drawn(1 << 20)
    assert len(small) == 3 and small[0] == 0, "the second, and two by lot"
    assert large == small, "4 MiB each, 16 MiB in all"
    assert drawn(3 << 20) == small[:1], "12 MiB each"
    assert not drawn(5 << 20)


class RightForFew(RewriteRuleClassBase):
    """Relu -> itself, for as many rows as the first proof has: the others are lost."""

    def pattern(self, op, x):
        return op.Relu(x)

    def rewrite(self, op, x):
        stops = [op.initializer(ir.tensor(np.array([n]), name=f"n{n}")) for n in (0, 11)]
        return op.Slice(op.Max(x, op.Sub(x, x)), *stops, stops[0])


def test_one_that_loses_rows_beyond_a_number_is_found():
    (said,) = [d.reason for d in rewriter.apply(chain(1, "t"), [RightForFew()]).report.declines]
    assert "has shape [11, 3] in the place of [17, 3]" in said


def test_a_small_feature_that_is_lost_counts():
    expected = np.array([[1000.0, 1e-4], [-900.0, 2e-4]], np.float32)
    wrong = expected * np.array([1, 0], np.float32)
    assert relative(expected, wrong)[0] < 1e-5, "below what float32 rounds beside the large one"
    expected[:, 1] *= 100
    error, where = relative(expected, wrong)
    assert error == pytest.approx(0.01) and where[1] == 1


def test_what_rounds_does_not():
    expected = np.array([[1000.0, 1e-3]], np.float32)
    assert relative(expected, expected + np.float32(5e-5))[0] < 1e-5


def test_a_proof_that_was_not_run_says_so():
    (proof,) = rewriter.apply(chain(1), [WrongFrom(1)]).report.proofs
    assert proof.ran and not proof.skipped
