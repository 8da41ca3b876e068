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
from rewriter.parity.local import Members


class WrongAt(RewriteRuleClassBase):
    """Relu -> itself; of some values its negative."""

    def __init__(self, wrong):
        super().__init__(name="relu")
        self._wrong = wrong

    def pattern(self, op, x):
        return op.Relu(x, _outputs=["out"])

    def rewrite(self, op, x, out):
        sign = np.array(-1 if out.name in self._wrong else 1, np.float32)
        return op.Mul(op.Max(x, op.Sub(x, x)), op.initializer(ir.tensor(sign, name="sign")))


def chain(nodes, rows="2"):
    body = " ".join(f"[n{i}] a{i + 1} = Relu(a{i}) [m{i}] b{i + 1} = Neg(a{i + 1})" for i in range(nodes))
    outputs = ", ".join(f"float[{rows},3] b{i + 1}" for i in range(nodes))
    return parse(f"g (float[{rows},3] a0) => ({outputs}) {{ {body} }}")


def failed(model, rule):
    return [decline.node for decline in rewriter.apply(model, [rule]).report.declines if decline.failed]


@pytest.mark.parametrize("wrong", [["a2", "a3", "a4"], ["a4"]], ids=["all but the first", "the last only"])
def test_a_rule_that_is_wrong_for_others_than_the_first_is_found_before_it_fires(wrong):
    assert failed(chain(4), WrongAt(wrong)) == ["n0", "n1", "n2", "n3"]


def test_one_that_is_right_passes():
    assert not failed(chain(4), WrongAt([]))


def members(count=50, *, small=True, last=None):
    """Which members of a class are run besides the first, and the last where it was found beforehand."""
    own = Members(small=small) if last is None else Members(small=small, last=f"n{last}", seen=2, run=2)
    rewrites = [SimpleNamespace(where=f"n{i}", jobs=[]) for i in range(1, count)]
    return [rewrite.where for rewrite in rewrites if own.draws(rewrite)]


def test_others_are_run_by_lot_where_they_are_small():
    found = members()
    assert len(found) == 3 and found[0] == "n1", "the second, and two by lot"
    assert members(small=False) == ["n1"]
    found = members(last=49)
    assert len(found) == 2 and "n49" not in found
    assert not members(small=False, last=49)


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
    (proof,) = rewriter.apply(chain(1), [WrongAt([])]).report.proofs
    assert proof.ran and not proof.skipped
