"""Gemm with a constant weight -> MatMulNBits, its bias included.

Matched:      Gemm(x, w[, c]) with transA = 0, alpha = 1; w [K, N], or [N, K] with transB = 1
Replacement:  MatMulNBits(x, codes, scales, zero_points?, , c) where c is [N] and beta = 1, else
              Add(MatMulNBits(x, ..), c)
Declines when:
              transA is set, or alpha is not 1, or beta is neither 1 nor without a c
              as matmul-to-matmul-nbits
Source:       com.microsoft::MatMulNBits; torch.onnx writes nn.Linear as Gemm(transB=1)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import onnx_ir as ir

from rewriter.facts import Recogniser
from rewriter.rule import Declined, Rule
from rules._guards import float_attribute, integer_attribute
from rules._matmul_nbits import AccuracyLevel, Linear, emit, read_linear
from rules.recognise import computed, views


class GemmToMatMulNBits(Rule):
    """The rule; ``accuracy_level`` is the operator's attribute, 0 leaves it out."""

    recognisers: ClassVar[Sequence[Recogniser]] = (*views.RECOGNISERS, *computed.RECOGNISERS)

    def __init__(self, accuracy_level: AccuracyLevel) -> None:
        super().__init__(name="gemm-to-matmul-nbits")
        self._accuracy_level = accuracy_level

    def pattern(self, op: Any, x: Any, w: Any) -> Any:
        return op.Gemm(x, w, _allow_other_inputs=True, _outputs=["y"])

    def rewrite(self, op: Any, *, x: ir.Value, w: ir.Value, y: ir.Value) -> Any:
        linear = self._read(x, w, y)
        node = y.producer()
        assert node is not None
        c = node.inputs[2] if len(node.inputs) > 2 else None
        n, _ = linear.job.shape
        if c is None or (c.shape is not None and c.shape.dims == (n,) and self.run.target.matmul_nbits_takes_bias):
            return emit(op, linear, bias=c, accuracy_level=self._accuracy_level)
        return op.Add(emit(op, linear, accuracy_level=self._accuracy_level), c)

    def _read(self, x: ir.Value, w: ir.Value, y: ir.Value) -> Linear:
        node = y.producer()
        assert node is not None
        linear = read_linear(
            self.run, str(self.name), x, w, node, transposed=bool(integer_attribute(node, "transB", 0))
        )
        if integer_attribute(node, "transA", 0):
            raise Declined("transA is set; MatMulNBits reads x as it is", node)
        if (alpha := float_attribute(node, "alpha", 1.0)) != 1.0:
            raise Declined(f"alpha is {alpha}; MatMulNBits has no such factor", node)
        has_c = len(node.inputs) > 2 and node.inputs[2] is not None
        if has_c and (beta := float_attribute(node, "beta", 1.0)) != 1.0:
            raise Declined(f"beta is {beta}; MatMulNBits adds its bias as it is", node)
        return linear


def rule(*, accuracy_level: AccuracyLevel = 0) -> Rule:
    """Builds the rule.

    Args:
        accuracy_level: 0 leaves it to the runtime; 4 lets kernels use int8 activations.
    """
    return GemmToMatMulNBits(accuracy_level)
