"""NumPy definitions of the contrib operators that rewrites emit, for ONNX's ReferenceEvaluator.

Pass them as ``ReferenceEvaluator(model, new_ops=list(REFERENCE_OPERATORS))``.
"""

from __future__ import annotations

from onnx.reference.op_run import OpRun

from rewriter.parity.operators.gather_block_quantized import GatherBlockQuantized
from rewriter.parity.operators.matmul_nbits import MatMulNBits
from rewriter.parity.operators.moe import MoE
from rewriter.parity.operators.qmoe import QMoE

REFERENCE_OPERATORS: tuple[type[OpRun], ...] = (MoE, QMoE, MatMulNBits, GatherBlockQuantized)

__all__ = ["REFERENCE_OPERATORS", "GatherBlockQuantized", "MatMulNBits", "MoE", "QMoE"]
