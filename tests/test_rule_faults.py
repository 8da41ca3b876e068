"""What is said of a rule that is wrong: the file and line where it failed, and a pattern that could never match."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
from onnxscript.rewriter import RewriteRuleClassBase

import rewriter
from rewriter.errors import RuleError, RuleSetError
from rewriter.rule import Rule

MODEL = '<ir_version: 10, opset_import: ["" : 21]> g (float[2] x) => (float[2] y) { y = Add (x, x) }'


class Fails(RewriteRuleClassBase):
    def pattern(self, op, x):
        return op.Add(x, x)

    def rewrite(self, op, x):
        raise IndexError("no such input")


def test_the_file_and_line_of_the_rule_are_said():
    with pytest.raises(RuleError) as caught:
        rewriter.apply(ir.from_onnx_text(MODEL), [Fails])
    line = 1 + Path(__file__).read_text().splitlines().index('        raise IndexError("no such input")')
    assert str(caught.value).endswith(f"IndexError: no such input ({__file__}:{line})")


class OneInput(RewriteRuleClassBase):
    def pattern(self, op, x):
        return op.Add(x)

    def rewrite(self, op, x):
        return x


class ThreeInputs(RewriteRuleClassBase):
    def pattern(self, op, x):
        return op.Neg(op.Add(x, x, x, _allow_other_inputs=True))

    def rewrite(self, op, x):
        return x


class SomeInputs(RewriteRuleClassBase):
    def pattern(self, op, x):
        return op.Add(x, _allow_other_inputs=True)

    def rewrite(self, op, x):
        return None


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (OneInput, r"can never fire: its pattern gives Add 1 input, and it takes 2; _allow_other_inputs=True takes"),
        (ThreeInputs, r"can never fire: its pattern gives Add 3 inputs, and it takes 2$"),
    ],
)
def test_a_pattern_with_a_wrong_number_of_inputs_is_an_error(rule, words):
    with pytest.raises(RuleSetError, match=words):
        rewriter.apply(ir.from_onnx_text(MODEL), [rule])


class ForgetsToReturn(Rule):
    def pattern(self, op, x):
        return op.Add(x, x)

    def rewrite(self, op, *, x):
        op.Mul(x, x)


def test_a_rewrite_that_returns_nothing_is_an_error():
    with pytest.raises(RuleError, match="rewrite returned None; return the new outputs, or raise NotApplicable or Dec"):
        rewriter.apply(ir.from_onnx_text(MODEL), [ForgetsToReturn])


def test_a_pattern_may_leave_inputs_open():
    assert not rewriter.apply(ir.from_onnx_text(MODEL), [SomeInputs]).report.applications
