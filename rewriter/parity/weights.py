"""What the constants of a subgraph hold in a proof: dequantized weights, and of a large stack its last experts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.errors import OverflowingError
from rewriter.operators.form import form_of, is_experts, operator_of
from rewriter.operators.moe import MOE
from rewriter.quantize.job import QuantizationJob
from rewriter.quantize.rows import put, shared_out
from rewriter.quantize.stack import StackTensor
from rewriter.quantize.types import QuantizedWeight
from rewriter.rule import Declined
from rewriter.tensors import RowsTensor, View, ViewTensor

Array = npt.NDArray[Any]

_EXPERTS = 8

_LARGE = 1 << 20
"""Bytes from which a weight is fed: a runtime copies, converts and packs an initializer, and folds what reads it."""

_ROWS = 1024
"""Rows that are dequantized at a time."""

_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_FED_TYPES = {ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


class Constants(Protocol):
    """A side of a rewrite."""

    nodes: list[ir.Node]
    constants: dict[ir.Value, ir.TensorProtocol]


def float_bytes(sides: Iterable[Constants], jobs: Iterable[QuantizationJob]) -> int:
    """Returns the bytes of the larger side's constants, its quantized weights in float32."""
    stored = [sum(tensor.nbytes for tensor in side.constants.values()) for side in sides]
    return max(*stored, sum(job.weight.size * 4 for job in jobs))


def experts_to_run(sides: Iterable[Constants], size: int, most: int) -> range | None:
    """Returns the experts that stand for all of a large MoE, the last among them; None where no selection can.

    Args:
        sides: of the rewrite.
        size: bytes of all of its weights in float32.
        most: bytes that may be run.
    """
    counts: set[int] = set()
    least = 1
    for side in sides:
        for node in side.nodes:
            if not is_experts(node):
                if node.op_type != "Softmax":
                    return None
                continue
            values = _expert_inputs(node)
            if form_of(node).sparse_mixer or any(value not in side.constants for value in values):
                return None
            counts |= {int(side.constants[value].shape.numpy()[0]) for value in values}
            least = max(least, form_of(node).k)
    if len(counts) != 1:
        return None
    one = size // min(counts)
    experts = max(least, min(_EXPERTS, most // 4 // one, *counts))
    return range(min(counts) - experts, min(counts)) if one * experts <= most else None


def stacks_of(side: Constants) -> set[ir.Value]:
    """Returns the constants whose first axis is the expert."""
    nodes = (node for node in side.nodes if is_experts(node))
    return {value for node in nodes for value in _expert_inputs(node)}


def fed_weights(side: Constants) -> set[ir.Value]:
    """Returns the large float constants that are read, directly or moved, only by operators that take any input.

    ONNX's own operators and MoE do; the kernels of others may ask for constants, or run another way without them.
    """
    static = set(side.constants)
    for node in side.nodes:
        if static.issuperset(value for value in node.inputs if value is not None):
            static.update(node.outputs)
    kept: set[ir.Value] = set()
    for node in reversed(side.nodes):
        any_input = not node.domain or MOE.computes(node)
        if not any_input or not kept.isdisjoint(node.outputs):
            kept |= static.intersection(value for value in node.inputs if value is not None)
    large = {v for v, tensor in side.constants.items() if tensor.dtype in _FED_TYPES and tensor.nbytes >= _LARGE}
    return large - kept


def some_experts(tensor: ir.TensorProtocol, experts: range) -> Array:
    """Returns some experts of a stack; the others are neither read nor computed."""
    first, count = experts.start, len(experts)
    if isinstance(tensor, StackTensor):
        return tensor.some(experts)
    if isinstance(tensor, RowsTensor):
        return tensor.rows(first, count)
    if isinstance(tensor, ViewTensor):
        return tensor.view.slice(0, first, count).numpy()
    return np.asarray(tensor.numpy())[first : experts.stop]


def dequantized(
    before: Constants, jobs: Iterable[QuantizationJob], experts: range | None, *, wide: bool = False
) -> Mapping[ir.Value, Array]:
    """Returns the float constants of the matched subgraph with what each job makes of its part of them.

    Args:
        before: the matched subgraph.
        jobs: the weights that are quantized.
        experts: which experts of a stack are run, or None for all.
        wide: whether halves become float32, so that codes times scales are not rounded to halves again.
    """
    result: dict[ir.Value, Array] = {}
    memory: dict[ir.Value, Array] = {}
    windows: list[Array] = []
    run = [job for job in jobs if experts is None or (job.context.expert or 0) in experts]
    held = [(job, *_holder(before, job)) for job in run]
    weights: dict[ir.Value, set[View]] = {}
    for job, value, _ in held:
        weights.setdefault(value, set()).add(job.weight)
    for job, value, holder in held:
        view = holder if experts is None else holder.slice(0, experts.start, len(experts))
        first, _ = view.span
        if value not in memory:
            widened = wide and job.weight.dtype in _HALVES
            dtype = ir.DataType.FLOAT if widened else job.weight.dtype
            memory[value] = _buffer(view, dtype, whole=sum(own.size for own in weights[value]) == view.size)
            result[value] = _window(memory[value], view, first)
        windows.append(_window(memory[value], job.weight, first))

    def fill(index: int) -> None:
        _dequantize(_quantized(run[index]), windows[index])

    for _ in shared_out(fill, range(len(run))):
        pass
    return result


def _quantized(job: QuantizationJob) -> QuantizedWeight:
    try:
        return job.quantize()
    except OverflowingError as error:
        remedy = "quantize it in more bits, or clip it before it is exported"
        raise Declined(str(error), remedy=remedy) from error


def _dequantize(weight: QuantizedWeight, into: Array) -> None:
    """A few rows at a time: the floats of a large weight are not in memory twice, and stay in a core's cache."""

    def fill(first: int) -> None:
        rows = slice(first, first + _ROWS)
        zeros = None if weight.zero_points is None else weight.zero_points[rows]
        part = replace(weight, codes=weight.codes[rows], scales=weight.scales[rows], zero_points=zeros)
        put(part.dequantize(), into[rows])

    for _ in shared_out(fill, range(0, len(into), _ROWS)):
        pass


def _expert_inputs(node: ir.Node) -> list[ir.Value]:
    operator = operator_of(node)
    slots = [] if operator is None else [slot for projection in operator.projections for slot in projection.stacks]
    return [value for slot in slots if slot < len(node.inputs) and (value := node.inputs[slot]) is not None]


def _holder(before: Constants, job: QuantizationJob) -> tuple[ir.Value, View]:
    """The constant of the matched subgraph that holds the job's weight, and what it shows.

    Of two that show the same numbers, as where a down projection is the up projection transposed, it is the one that
    shows them as the job does.
    """
    low, high = job.weight.span
    holders = []
    for value, tensor in before.constants.items():
        view = View.whole(tensor, "")
        first, last = view.span
        if view.source == job.weight.source and first <= low and high <= last:
            holders.append((value, view))
    if not holders:
        raise Declined(f"weight '{job.context.weight}' is not among the constants of what its rule matched")
    return max(holders, key=lambda held: held[1].strides[-2:] == job.weight.strides)


def _buffer(view: View, dtype: ir.DataType, *, whole: bool) -> Array:
    """A copy of the part of its source that the view shows, in the type of a weight in it: a cast may widen that.

    Where weights take the place of the whole, nothing is copied.
    """
    first, last = view.span
    memory = np.zeros(last - first + 1, dtype=dtype.numpy())
    if not whole:
        _window(memory, view, first)[...] = view.numpy()
    return memory


def _window(memory: Array, view: View, first: int) -> Array:
    """The view's elements in a copy of the part of its source that starts at ``first``."""
    item = memory.itemsize
    return np.lib.stride_tricks.as_strided(
        memory[view.offset - first :], view.shape, tuple(s * item for s in view.strides)
    )
