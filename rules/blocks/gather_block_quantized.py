"""What the rules to GatherBlockQuantized share: the quantized parts of a table or stack, and the operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from rewriter.operators.layout import gather_block_quantized as layout
from rewriter.operators.layout.gather_block_quantized import GatherArrays
from rewriter.quantize.job import PartTensor, QuantizationJob, packed_parts
from rewriter.quantize.stack import packed_stack
from rewriter.quantize.types import QuantizedWeight

LAYOUT = "gather_block_quantized"


def quantized_rows(
    jobs: Sequence[QuantizationJob], dtype: ir.DataType, name: str, *, stack: bool
) -> tuple[PartTensor, ...]:
    """Returns data, scales and, where asymmetric, zero points.

    Args:
        jobs: one weight [V, K] for a table, or E weights [N, K] of one spec for a stack.
        dtype: of the scales.
        name: what the tensors' names begin with.
        stack: whether the tensors have an axis of experts.
    """
    n, k = jobs[0].shape
    spec = jobs[0].context.spec
    lead = (len(jobs), n) if stack else (n,)
    shapes = layout.shapes(lead, k, spec.bits, spec.block_size, symmetric=spec.symmetric)
    types = (ir.DataType.UINT8, dtype, ir.DataType.UINT8)
    parts = [
        (f"{name}_{suffix}", part, shape)
        for suffix, part, shape in zip((f"q{spec.bits}", "scales", "zero_points"), types, shapes, strict=True)
        if shape is not None
    ]

    def unpack(arrays: Sequence[Any]) -> QuantizedWeight:
        zero_points = arrays[2] if len(arrays) > 2 else None
        return layout.unpack(GatherArrays(arrays[0], arrays[1], zero_points), n, k, spec.bits, spec.block_size)

    if stack:
        return packed_stack(jobs, f"{LAYOUT}_stack", _pack, unpack, parts)
    return packed_parts(jobs[0], LAYOUT, _pack, unpack, parts)


def gather(op: Any, data: Any, ids: Any, others: Sequence[Any], *, bits: int, block: int, axis: int) -> Any:
    """Writes the operator: rows ``ids`` of ``data``, dequantized along its last axis ``axis``."""
    return op.GatherBlockQuantized(
        data, ids, *others, _domain="com.microsoft", bits=bits, block_size=block, gather_axis=0, quantize_axis=axis
    )


def _pack(quantized: QuantizedWeight) -> Sequence[Any]:
    arrays = layout.pack(quantized)
    return [a for a in (arrays.data, arrays.scales, arrays.zero_points) if a is not None]
