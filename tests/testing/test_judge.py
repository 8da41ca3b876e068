"""Who judges a rule: a form that ONNX Runtime's optimizer fuses into a kernel that rounds is right without it."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from onnxscript.rewriter import RewriteRuleClassBase

from rewriter.testing import OrtRuntime, ReferenceRuntime, check_model, check_rule, near_misses

FEW = settings(max_examples=3, derandomize=True, database=None)
NUMBERS = ", ".join(str(i % 7 - 3) for i in range(32 * 2))
LINEAR = f"""
<ir_version: 10, opset_import: ["" : 21]>
g (float[T, 32] x) => (float[T, 2] y) <float[32, 2] w = {{{NUMBERS}}}> {{ y = MatMul(x, w) }}
"""


class ToDequantizeLinear(RewriteRuleClassBase):
    """MatMul by integers from -8 to 7 -> DequantizeLinear of 4 bits before it, which is exact."""

    def __init__(self, wrong=0):
        super().__init__(name="to-dequantize-linear")
        self._wrong = wrong

    def pattern(self, op, x, w):
        return op.MatMul(x, w)

    def check(self, context, x, w):
        return w.is_initializer() and not w.is_graph_input() and np.isin(w.const_value.numpy(), np.arange(-8, 8)).all()

    def rewrite(self, op, x, w):
        integers = w.const_value.numpy() + self._wrong
        codes = op.initializer(ir.tensor(integers.astype(ml_dtypes.int4), name="codes"))
        scales = op.initializer(ir.tensor(np.ones((1, w.shape[1]), np.float32), name="scales"))
        return op.MatMul(x, op.DequantizeLinear(codes, scales, axis=0, block_size=w.shape[0]))


def models():
    return st.builds(lambda: ir.from_onnx_text(LINEAR))


def test_by_default_the_optimizer_fuses_what_whole_models_are_compared_by():
    with pytest.raises(AssertionError, match=r"output 'y' is .* in the result; the tolerance is 1e-06"):
        check_model(ToDequantizeLinear(), LINEAR)


@pytest.mark.parametrize("judge", [OrtRuntime(optimize=False), ReferenceRuntime()])
def test_without_optimizations_the_same_rule_is_right(judge):
    assert check_model(ToDequantizeLinear(), LINEAR, judge=judge).applied == {"to-dequantize-linear": 1}
    check_rule(ToDequantizeLinear(), models(), judge=judge, settings=FEW)
    near_misses(ToDequantizeLinear(), models(), judge=judge, settings=FEW)


def test_a_wrong_rule_is_wrong_before_every_judge():
    with pytest.raises(AssertionError, match="failed its parity"):
        check_model(ToDequantizeLinear(1), LINEAR, judge=OrtRuntime(optimize=False))
