"""NumPy definitions of the contrib operators that rewrites emit, for ONNX's ReferenceEvaluator.

Pass them as ``ReferenceEvaluator(model, new_ops=list(REFERENCE_OPERATORS))``.
"""

from __future__ import annotations

from onnx.reference.op_run import OpRun

from rewriter.operators.reference.gather_block_quantized import GatherBlockQuantized
from rewriter.operators.reference.matmul_nbits import MatMulNBits
from rewriter.operators.reference.moe import MoE
from rewriter.operators.reference.qmoe import QMoE

REFERENCE_OPERATORS: tuple[type[OpRun], ...] = (MoE, QMoE, MatMulNBits, GatherBlockQuantized)

__all__ = ["REFERENCE_OPERATORS", "GatherBlockQuantized", "MatMulNBits", "MoE", "QMoE"]
