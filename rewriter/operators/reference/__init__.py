"""NumPy definitions of the contrib operators that rewrites emit, for ONNX's ReferenceEvaluator.

Pass them as ``ReferenceEvaluator(model, new_ops=list(REFERENCE_OPERATORS))``.
"""

from __future__ import annotations

from onnx.reference.op_run import OpRun

from rewriter.operators.gather_block_quantized.reference import GatherBlockQuantized
from rewriter.operators.matmul_nbits.reference import MatMulNBits
from rewriter.operators.moe.reference import MoE
from rewriter.operators.qmoe.reference import QMoE

REFERENCE_OPERATORS: tuple[type[OpRun], ...] = (MoE, QMoE, MatMulNBits, GatherBlockQuantized)
