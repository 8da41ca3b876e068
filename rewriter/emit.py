"""Writes com.microsoft::MatMulNBits in a replacement: what a rule that quantizes a linear map ends with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import onnx_ir as ir

from rewriter.graph.declines import reason_of
from rewriter.operators.layout import matmul_nbits as layout
from rewriter.operators.layout.matmul_nbits import MatMulNBitsArrays
from rewriter.quantize.job import Arrays, QuantizationJob, packed_parts
from rewriter.quantize.types import QuantizedWeight
from rewriter.rule import Declined, Run

AccuracyLevel = Literal[0, 1, 2, 3, 4]


def matmul_nbits(
    run: Run,
    op: Any,
    x: ir.Value,
    job: QuantizationJob,
    *,
    bias: ir.Value | None = None,
    accuracy_level: AccuracyLevel = 0,
) -> ir.Value:
    """Writes ``x @ w.T + bias``, w the [N, K] weight of a job; nothing is quantized before it is written or read.

    Args:
        run: the rule's ``run``, whose target must have the kernel.
        op: onnxscript's builder, as ``rewrite`` gets it.
        x: [.., K] activations, of the element type in which the job's scales are stored.
        job: what ``run.quantize`` returned.
        bias: [N], or None. Not every target reads it: see ``run.target.linear.takes_bias``.
        accuracy_level: the attribute; 0 leaves it out.

    Returns:
        [.., N], of the type of x.

    Raises:
        Declined: the operator cannot hold the weight so, or the target does not run it.
    """
    require_matmul_nbits(run, job)
    tensors = packed_parts(job, "matmul_nbits", pack, lambda arrays: unpack(arrays, job), parts_of(job))
    weight = [op.initializer(tensor) for tensor in tensors]
    return on_parts(op, x, weight, job, bias=bias, accuracy_level=accuracy_level)


def require_matmul_nbits(run: Run, job: QuantizationJob, culprit: ir.Value | None = None) -> None:
    """Declines where the operator cannot hold what ``job`` makes of its weight, or the target does not run it."""
    spec = job.context.spec
    if reason := layout.illegal(*job.shape, spec.bits, spec.block_size):
        raise Declined(reason, culprit)
    if reason := run.target.linear.refusal(job.weight.dtype.name, spec.bits):
        raise Declined(f"MatMulNBits on {run.target}: {reason}", culprit, remedy=reason_of(reason).remedy)


def on_parts(
    op: Any,
    x: ir.Value,
    weight: Sequence[ir.Value],
    job: QuantizationJob,
    *,
    bias: ir.Value | None = None,
    accuracy_level: AccuracyLevel = 0,
) -> ir.Value:
    """Writes the operator on values that hold the parts of a job, as ``parts_of`` lists them."""
    n, k = job.shape
    spec = job.context.spec
    inputs: list[ir.Value | None] = [x, *weight]
    if bias is not None:
        inputs += [None] * (5 - len(inputs)) + [bias]
    optional = {"accuracy_level": accuracy_level} if accuracy_level else {}
    held = {"K": k, "N": n, "bits": spec.bits, "block_size": spec.block_size}
    out: ir.Value = op.MatMulNBits(*inputs, _domain="com.microsoft", **held, **optional)
    return out


def parts_of(job: QuantizationJob) -> list[tuple[str, ir.DataType, Sequence[int]]]:
    """Returns name, type and shape of B, scales and, where asymmetric, zero points."""
    n, k = job.shape
    spec = job.context.spec
    shapes = layout.shapes(n, k, spec.bits, spec.block_size, spec.symmetric)
    types = (ir.DataType.UINT8, ir.DataType.from_numpy(job.context.scale_dtype), ir.DataType.UINT8)
    return [
        (f"{job.context.weight}_{suffix}", dtype, shape)
        for suffix, dtype, shape in zip((f"q{spec.bits}", "scales", "zero_points"), types, shapes, strict=True)
        if shape is not None
    ]


def pack(quantized: QuantizedWeight) -> Arrays:
    """Lays a weight out as the operator's arrays."""
    arrays = layout.pack(quantized)
    return [a for a in (arrays.b, arrays.scales, arrays.zero_points) if a is not None]


def unpack(arrays: Sequence[Any], job: QuantizationJob) -> QuantizedWeight:
    """Reads the operator's arrays back."""
    n, k = job.shape
    spec = job.context.spec
    zero_points = arrays[2] if len(arrays) > 2 else None
    return layout.unpack(MatMulNBitsArrays(arrays[0], arrays[1], zero_points), n, k, spec.bits, spec.block_size)
