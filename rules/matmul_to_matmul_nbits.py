"""MatMul with a constant weight -> MatMulNBits.

Matched:      MatMul(x, w), w constant: [K, N], or [1, .., K, N] under an x of that rank
Replacement:  MatMulNBits(x, codes, scales[, zero_points])
Declines when:
              w is not constant though it comes out of a constant stack
              w is on the left, or holds several matrices
              the float weight would stay in the model beside the quantized one
              the plan keeps w in float, or the target has no such kernel
Source:       com.microsoft::MatMulNBits; every exporter's linear layers and unstacked experts
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from rewriter.emit import matmul_nbits
from rewriter.quantize.plan import AccuracyLevel
from rewriter.rule import Rule
from rewriter.rules.blocks.matmul_nbits import read_linear


class MatMulToMatMulNBits(Rule):
    """The rule; ``accuracy_level`` is the operator's attribute, None is the rule set's."""

    def __init__(self, accuracy_level: AccuracyLevel | None) -> None:
        super().__init__(name="matmul-to-matmul-nbits")
        self._accuracy_level = accuracy_level

    def pattern(self, op: Any, x: Any, w: Any) -> Any:
        return op.MatMul(x, w, _outputs=["y"])

    def rewrite(self, op: Any, *, x: ir.Value, w: ir.Value, y: ir.Value) -> Any:
        node = y.producer()
        assert node is not None
        job = read_linear(self.run, x, w, node, transposed=False)
        return matmul_nbits(self.run, op, x, job, accuracy_level=self._accuracy_level)


def rule(*, accuracy_level: AccuracyLevel | None = None) -> Rule:
    """Builds the rule.

    Args:
        accuracy_level: 0 leaves it to the runtime, 4 allows activations of 8 bits, null is as the rule set says.
    """
    return MatMulToMatMulNBits(accuracy_level)
