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

from typing import Any

import onnx_ir as ir

from rewriter.emit import matmul_nbits
from rewriter.graph.attributes import integer_attribute
from rewriter.quantize.plan import AccuracyLevel
from rewriter.rule import Rule
from rewriter.rules.blocks.matmul_nbits import addend, read_linear, takes_bias


class GemmToMatMulNBits(Rule):
    """The rule; ``accuracy_level`` is the operator's attribute, None is the rule set's."""

    def __init__(self, accuracy_level: AccuracyLevel | None) -> None:
        super().__init__(name="gemm-to-matmul-nbits")
        self._accuracy_level = accuracy_level

    def pattern(self, op: Any, x: Any, w: Any) -> Any:
        return op.Gemm(x, w, _allow_other_inputs=True, _outputs=["y"])

    def rewrite(self, op: Any, *, x: ir.Value, w: ir.Value, y: ir.Value) -> Any:
        node = y.producer()
        assert node is not None
        transposed = bool(integer_attribute(node, "transB", 0))
        job = read_linear(self.run, x, w, node, transposed=transposed)
        c = addend(node)
        bias = c if c is not None and takes_bias(self.run, job.shape[0], c) else None
        product = matmul_nbits(self.run, op, x, job, bias=bias, accuracy_level=self._accuracy_level)
        return product if c is bias else op.Add(product, c)


def rule(*, accuracy_level: AccuracyLevel | None = None) -> Rule:
    """Builds the rule.

    Args:
        accuracy_level: 0 leaves it to the runtime, 4 allows activations of 8 bits, null is as the rule set says.
    """
    return GemmToMatMulNBits(accuracy_level)
