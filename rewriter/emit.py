"""What replacements are written with: contrib operators, constants of integers, and a quantized linear map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from rewriter.graph.declines import Reason, reason_of
from rewriter.operators import matmul_nbits as definition
from rewriter.operators.layout.stored import Refusal, Stored
from rewriter.operators.matmul_nbits import MATMUL_NBITS
from rewriter.operators.operator import DOMAIN, Operator
from rewriter.quantize.job import QuantizationJob, packed_parts
from rewriter.quantize.plan import AccuracyLevel
from rewriter.quantize.types import QuantizedShape
from rewriter.rule import Declined, Run


def typed(value: ir.Value, dtype: ir.DataType, shape: Sequence[int | str | None]) -> ir.Value:
    """Notes element type and shape of a value that the replacement has made; returns it.

    Raises:
        ValueError: the value is the model's own, which declares its type itself.
    """
    producer = value.producer()
    if producer is None or producer.graph is not None:
        raise ValueError(f"'{value.name}' is the model's own value, so its type cannot be set")
    value.dtype, value.shape = dtype, ir.Shape(shape)
    return value


def write_operator(
    op: Any, operator: Operator, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Any]
) -> ir.Value:
    """Writes a contrib operator; optional inputs that are left out at the end are not written.

    Args:
        op: onnxscript's builder, as ``rewrite`` gets it.
        operator: which.
        inputs: one for each slot; None leaves it out.
        attributes: of the node.

    Returns:
        Its output.
    """
    given = list(inputs)
    while given and given[-1] is None:
        given.pop()
    out: ir.Value = getattr(op, operator.name)(*given, _domain=DOMAIN, **attributes)
    return out


def write_integers(op: Any, numbers: Sequence[int], name: str) -> ir.Value:
    """Returns a constant of integers [len(numbers)], as operators take axes and shapes."""
    value: ir.Value = op.initializer(ir.tensor(np.array(numbers, np.int64), name=name))
    return value


def matmul_nbits(
    run: Run,
    op: Any,
    x: ir.Value,
    job: QuantizationJob,
    *,
    bias: ir.Value | None = None,
    accuracy_level: AccuracyLevel | None = None,
) -> ir.Value:
    """Writes ``x @ w.T + bias``, w the [N, K] weight of a job; nothing is quantized before it is written or read.

    Args:
        run: the rule's ``run``, whose target must have the kernel.
        op: onnxscript's builder, as ``rewrite`` gets it.
        x: [.., K] activations, of the element type in which the job's scales are stored.
        job: what ``run.quantize`` returned.
        bias: [N], or None. Not every target reads it: see ``run.target.linear.takes_bias``.
        accuracy_level: the attribute, by default the rule set's; 0 leaves it out.

    Returns:
        [.., N], of the type of x.

    Raises:
        Declined: the operator cannot hold the weight so, or the target does not run it.
    """
    stored = require_matmul_nbits(run, job)
    tensors = packed_parts(job, stored, job.context.weight, scale_type(job))
    weight = [op.initializer(tensor) for tensor in tensors]
    return on_parts(run, op, x, weight, job, bias=bias, accuracy_level=accuracy_level)


def require_matmul_nbits(run: Run, job: QuantizationJob, culprit: ir.Value | None = None) -> Stored:
    """Returns how the operator stores what a job makes, or declines: it cannot, or the target does not run it."""
    if reason := matmul_nbits_refusal(run, job.stored_shape, job.weight.dtype):
        raise Declined(reason, culprit, remedy=reason_of(reason).remedy)
    return definition.RAW.require(job.stored_shape)


def matmul_nbits_refusal(run: Run, shape: QuantizedShape, dtype: ir.DataType) -> str | None:
    """Returns why the operator cannot hold a weight so, or the target does not run it so, or None.

    Args:
        run: the rule's ``run``.
        shape: how the weight would be quantized.
        dtype: of the activations.
    """
    stored = definition.RAW.of(shape)
    if isinstance(stored, Refusal):
        return stored.reason
    reason = run.target.linear.refusal(dtype.name, shape.bits, shape.block, symmetric=shape.symmetric)
    return (
        None if reason is None else Reason(f"{MATMUL_NBITS.name} on {run.target}: {reason}", reason_of(reason).remedy)
    )


def on_parts(
    run: Run,
    op: Any,
    x: ir.Value,
    weight: Sequence[ir.Value],
    job: QuantizationJob,
    *,
    bias: ir.Value | None,
    accuracy_level: AccuracyLevel | None,
) -> ir.Value:
    """Writes the operator on values that hold B, scales and, where asymmetric, zero points of a job."""
    n, k = job.shape
    spec = job.context.spec
    inputs: list[ir.Value | None] = [x, *weight]
    inputs += [None] * (definition.BIAS - len(inputs)) + [bias]
    attributes = {"K": k, "N": n, "bits": spec.bits, "block_size": spec.block_size}
    if level := level_of(run, accuracy_level):
        attributes["accuracy_level"] = level
    return write_operator(op, MATMUL_NBITS, inputs, attributes)


def level_of(run: Run, own: AccuracyLevel | None) -> AccuracyLevel:
    """Returns the accuracy_level that a rule's option says, or the rule set where it says none."""
    return run.accuracy_level if own is None else own


def scale_type(job: QuantizationJob) -> ir.DataType:
    """Returns the element type in which a job's scales are stored."""
    return ir.DataType.from_numpy(job.context.scale_dtype)
