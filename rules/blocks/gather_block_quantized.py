"""What the rules to GatherBlockQuantized share: the quantized parts of a table or stack, and the operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from rewriter.emit import write_operator
from rewriter.operators.gather_block_quantized import GATHER_BLOCK_QUANTIZED
from rewriter.operators.layout.stored import Stored
from rewriter.quantize.job import PartTensor, QuantizationJob, packed_parts
from rewriter.quantize.stack import packed_stack


def quantized_rows(
    jobs: Sequence[QuantizationJob], stored: Stored, dtype: ir.DataType, name: str, *, stack: bool
) -> tuple[PartTensor, ...]:
    """Returns data, scales and, where asymmetric, zero points.

    Args:
        jobs: one weight [V, K] for a table, or E weights [N, K] of one spec for a stack.
        stored: how each of them is stored.
        dtype: of the scales.
        name: what the tensors' names begin with.
        stack: whether the tensors have an axis of experts.
    """
    return packed_stack(jobs, stored, name, dtype) if stack else packed_parts(jobs[0], stored, name, dtype)


def gather(op: Any, data: Any, ids: Any, others: Sequence[Any], *, bits: int, block: int, axis: int) -> Any:
    """Writes the operator: rows ``ids`` of ``data``, dequantized along its last axis ``axis``."""
    attributes = {"bits": bits, "block_size": block, "gather_axis": 0, "quantize_axis": axis}
    return write_operator(op, GATHER_BLOCK_QUANTIZED, [data, ids, *others], attributes)
