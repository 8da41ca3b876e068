"""What the rules to MatMulNBits share: reading a constant [N, K] weight, and writing the operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import onnx_ir as ir

from rewriter.layout import matmul_nbits
from rewriter.layout.matmul_nbits import MatMulNBitsArrays
from rewriter.quantize.job import QuantizationJob, packed_parts
from rewriter.rule import Declined, NotApplicable, Run
from rewriter.tensors import View
from rules._guards import FLOATS, require_constant, require_dtype

AccuracyLevel = Literal[0, 1, 2, 3, 4]


@dataclass(frozen=True)
class Linear:
    """A linear map with a constant weight.

    Attributes:
        x: [.., K] activations.
        job: the [N, K] weight and how it is quantized.
        dtype: element type of x and of the scales.
    """

    x: ir.Value
    job: QuantizationJob
    dtype: ir.DataType


def read_linear(run: Run, rule: str, x: ir.Value, w: ir.Value, reader: ir.Node, *, transposed: bool) -> Linear:
    """Reads ``x @ w`` (``x @ w.T`` where ``transposed``), or declines.

    Args:
        run: the present run.
        rule: name of the asking rule.
        x: [.., K] activations.
        w: [K, N], [1, .., K, N], or [N, K] where ``transposed``.
        reader: the node that multiplies.
        transposed: whether ``w`` is stored [N, K].
    """
    facts = run.facts
    if facts.get(x, View) is not None and facts.get(w, View) is None:
        raise Declined("the weight is on the left; MatMulNBits takes it on the right", x)
    if facts.get(w, View) is None and not facts.why_not(w):
        raise NotApplicable
    view = require_constant(facts, w, "the weight")
    if view.rank < 2 or not view.dtype.is_floating_point():
        raise NotApplicable
    if any(d != 1 for d in view.shape[:-2]):
        raise Declined(f"the weight {list(view.shape)} holds {view.size} elements in more than one matrix", w)
    if view.rank > 2 and (x.shape is None or x.shape.rank() < view.rank):
        raise Declined(f"the weight has rank {view.rank} and the rank of its input is lower or unknown", x)
    dtype = require_dtype(x, FLOATS, "the input")
    if dtype != view.dtype:
        raise Declined(f"the weight is {view.dtype.name} and its input {dtype.name}", w)
    if dtype == ir.DataType.BFLOAT16 and not run.target.runs_bfloat16:
        raise Declined(f"target {run.target} has no bfloat16 kernel for MatMulNBits", w)
    if 0 in view.shape:
        raise Declined(f"the weight {list(view.shape)} is empty", w)
    _require_float_copy_disappears(w)
    matrix = view.reshape(view.shape[-2:])
    job = run.quantize(matrix if transposed else matrix.T, reader, rule, dtype.numpy())
    spec = job.context.spec
    if reason := matmul_nbits.illegal(*job.shape, spec.bits, spec.block_size):
        raise Declined(reason, w)
    if spec.bits not in run.target.matmul_nbits_bits:
        runs = run.target.matmul_nbits_bits
        raise Declined(f"target {run.target} runs MatMulNBits at {runs} bits, not {spec.bits}", w)
    return Linear(x, job, dtype)


def emit(op: Any, linear: Linear, *, bias: ir.Value | None = None, accuracy_level: int = 0) -> Any:
    """Writes the MatMulNBits that computes ``linear``, plus ``bias`` [N] where given."""
    job = linear.job
    n, k = job.shape
    spec = job.context.spec
    shapes = matmul_nbits.shapes(n, k, spec.bits, spec.block_size, spec.symmetric)
    name = job.context.weight
    types = (ir.DataType.UINT8, linear.dtype, ir.DataType.UINT8)
    parts = [
        (f"{name}_{suffix}", dtype, shape)
        for suffix, dtype, shape in zip((f"q{spec.bits}", "scales", "zero_points"), types, shapes, strict=True)
        if shape is not None
    ]
    tensors = packed_parts(job, "matmul_nbits", _pack, lambda arrays: _unpack(arrays, job), parts)
    inputs: list[ir.Value | None] = [linear.x, *(op.initializer(tensor) for tensor in tensors)]
    if bias is not None:
        inputs += [None] * (5 - len(inputs)) + [bias]
    optional = {"accuracy_level": accuracy_level} if accuracy_level else {}
    return op.MatMulNBits(
        *inputs,
        _domain="com.microsoft",
        K=k,
        N=n,
        bits=spec.bits,
        block_size=spec.block_size,
        **optional,
    )


def _require_float_copy_disappears(w: ir.Value) -> None:
    """Declines where quantizing would leave the float weight in the model beside the quantized one."""
    producer = w.producer()
    if producer is not None and producer.op_type != "Constant":
        raise Declined("the weight is part of a constant that stays in the model (rule unstack takes it out)", producer)
    for use in w.uses():
        if use.node.op_type not in ("MatMul", "Gemm") or use.idx != 1:
            raise Declined(f"the float weight would stay in the model: {use.node.op_type} also reads it", use.node)
    if w.is_graph_output():
        raise Declined("the float weight would stay in the model: it is a graph output", w)


def _pack(quantized: Any) -> Sequence[Any]:
    arrays = matmul_nbits.pack(quantized)
    found = (arrays.b, arrays.scales, arrays.zero_points)
    return [a for a in found if a is not None]


def _unpack(arrays: Sequence[Any], job: QuantizationJob) -> Any:
    n, k = job.shape
    spec = job.context.spec
    zero_points = arrays[2] if len(arrays) > 2 else None
    return matmul_nbits.unpack(MatMulNBitsArrays(arrays[0], arrays[1], zero_points), n, k, spec.bits, spec.block_size)
