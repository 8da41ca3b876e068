"""What the rules to MatMulNBits share: reading a constant [N, K] weight, and writing the operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import onnx_ir as ir

from rewriter.layout import matmul_nbits
from rewriter.layout.matmul_nbits import MatMulNBitsArrays
from rewriter.quantize.job import Arrays, QuantizationJob, packed_parts
from rewriter.quantize.types import QuantizedWeight
from rewriter.rule import Declined, NotApplicable, Run
from rewriter.tensors import View
from rules._guards import FLOATS, float_attribute, integer_attribute, require_constant, require_dtype

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
    matrix = read_weight(run, x, w)
    _require_float_copy_disappears(run, w, reader)
    job = run.quantize(matrix if transposed else matrix.T, reader, rule, matrix.dtype.numpy())
    require_kernel(run, job, w)
    return Linear(x, job, matrix.dtype)


def read_weight(run: Run, x: ir.Value, w: ir.Value) -> View:
    """Returns the one constant matrix that ``w`` is, as it is stored, or declines; see ``read_linear``."""
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
    known = x.dtype is not None or view.dtype not in FLOATS  # else it is the weight's: a product's operands have one
    dtype = require_dtype(x, FLOATS, "the input") if known else view.dtype
    if dtype != view.dtype:
        raise Declined(f"the weight is {view.dtype.name} and its input {dtype.name}", w)
    if 0 in view.shape:
        raise Declined(f"the weight {list(view.shape)} is empty", w)
    return view.reshape(view.shape[-2:])


def require_kernel(run: Run, job: QuantizationJob, w: ir.Value) -> None:
    """Declines where the target's MatMulNBits does not run what ``job`` makes of ``w``."""
    spec = job.context.spec
    if reason := matmul_nbits.illegal(*job.shape, spec.bits, spec.block_size):
        raise Declined(reason, w)
    if reason := run.target.linear.refusal(job.weight.dtype.name, spec.bits):
        raise Declined(f"MatMulNBits on {run.target}: {reason}", w)


def addend(node: ir.Node) -> ir.Value | None:
    """Returns what a Gemm adds to ``x @ w``, or declines: it computes something else."""
    if integer_attribute(node, "transA", 0):
        raise Declined("transA is set; MatMulNBits reads x as it is", node)
    if (alpha := float_attribute(node, "alpha", 1.0)) != 1.0:
        raise Declined(f"alpha is {alpha}; MatMulNBits has no such factor", node)
    c = node.inputs[2] if len(node.inputs) > 2 else None
    if c is not None and (beta := float_attribute(node, "beta", 1.0)) != 1.0:
        raise Declined(f"beta is {beta}; MatMulNBits adds its bias as it is", node)
    return c


def takes_bias(run: Run, n: int, c: ir.Value) -> bool:
    """Whether MatMulNBits adds ``c`` itself."""
    return c.shape is not None and c.shape.dims == (n,) and run.target.linear.takes_bias


def emit(op: Any, linear: Linear, *, bias: ir.Value | None = None, accuracy_level: int = 0) -> Any:
    """Writes the MatMulNBits that computes ``linear``, plus ``bias`` [N] where given."""
    job = linear.job
    tensors = packed_parts(job, "matmul_nbits", pack, lambda arrays: unpack(arrays, job), parts_of(job, linear.dtype))
    weight = [op.initializer(tensor) for tensor in tensors]
    return write(op, linear.x, weight, job, bias=bias, accuracy_level=accuracy_level)


def parts_of(job: QuantizationJob, dtype: ir.DataType) -> list[tuple[str, ir.DataType, Sequence[int]]]:
    """Returns name, type and shape of B, scales and, where asymmetric, zero points."""
    n, k = job.shape
    spec = job.context.spec
    shapes = matmul_nbits.shapes(n, k, spec.bits, spec.block_size, spec.symmetric)
    name = job.context.weight
    types = (ir.DataType.UINT8, dtype, ir.DataType.UINT8)
    return [
        (f"{name}_{suffix}", part, shape)
        for suffix, part, shape in zip((f"q{spec.bits}", "scales", "zero_points"), types, shapes, strict=True)
        if shape is not None
    ]


def write(
    op: Any,
    x: ir.Value,
    weight: Sequence[ir.Value],
    job: QuantizationJob,
    *,
    bias: ir.Value | None = None,
    accuracy_level: int = 0,
) -> Any:
    """Writes the operator on ``weight``: B, scales and, where asymmetric, zero points."""
    n, k = job.shape
    spec = job.context.spec
    inputs: list[ir.Value | None] = [x, *weight]
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


def _require_float_copy_disappears(run: Run, w: ir.Value, reader: ir.Node) -> None:
    """Declines where quantizing would leave the float weight in the model beside the quantized one."""
    producer = w.producer()
    if producer is not None and producer.op_type != "Constant":
        raise Declined("the weight is part of a constant that stays in the model (rule unstack takes it out)", producer)
    for use in w.uses():
        if use.node.op_type not in ("MatMul", "Gemm") or use.idx != 1:
            raise Declined(f"the float weight would stay in the model: {use.node.op_type} also reads it", use.node)
        if use.node is not reader:
            _require_linear(run, use.node, w)
    if w.is_graph_output():
        raise Declined("the float weight would stay in the model: it is a graph output", w)


def _require_linear(run: Run, node: ir.Node, w: ir.Value) -> None:
    """Declines where another reader of ``w`` cannot become a MatMulNBits as well."""
    x = node.inputs[0]
    try:
        if x is not None:
            read_weight(run, x, w)
        if node.op_type == "Gemm":
            addend(node)
    except Declined as other:
        reason = f"the float weight would stay in the model: {node.op_type} also reads it, and {other.reason}"
        raise Declined(reason, node) from other


def pack(quantized: QuantizedWeight) -> Arrays:
    """Lays a weight out as the operator's arrays."""
    arrays = matmul_nbits.pack(quantized)
    found = (arrays.b, arrays.scales, arrays.zero_points)
    return [a for a in found if a is not None]


def unpack(arrays: Sequence[Any], job: QuantizationJob) -> QuantizedWeight:
    """Reads the operator's arrays back."""
    n, k = job.shape
    spec = job.context.spec
    zero_points = arrays[2] if len(arrays) > 2 else None
    return matmul_nbits.unpack(MatMulNBitsArrays(arrays[0], arrays[1], zero_points), n, k, spec.bits, spec.block_size)
