"""The weights that a rule set would quantize: their groups, the bytes of each form, and errors measured on a sample."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from rewriter.quantize.hessian import Inputs
from rewriter.quantize.job import PartTensor, QuantizationJob
from rewriter.quantize.types import FloatArray, WeightSpec
from rewriter.result import Result

JOBS, ROWS, INPUTS = 4, 64, 2048
"""Weights of each role of a group, rows of each, and inputs that are looked at."""


_LEAST = 4096
"""Bytes of a model without a node: versions, and what made it."""


def quantized_jobs(result: Result[Any]) -> list[QuantizationJob]:
    """Returns the weights that a rewritten model will quantize when it is saved."""
    tensors = (value.const_value for graph in result.ir_model.graphs() for value in graph.initializers.values())
    parts = (tensor for tensor in tensors if isinstance(tensor, PartTensor))
    return list({job.key: job for tensor in parts for job in tensor.jobs}.values())


def group_jobs(jobs: Sequence[QuantizationJob]) -> dict[tuple[str, int | None], list[QuantizationJob]]:
    """Returns the weights by role and layer; all those of the experts of a layer are one group."""
    grouped: dict[tuple[str, int | None], list[QuantizationJob]] = {}
    for job in jobs:
        role = job.context.role
        grouped.setdefault(("expert*" if role.startswith("expert") else role, job.context.layer), []).append(job)
    return grouped


def model_bytes(model: ir.Model, *, quantized: bool = True) -> int:
    """Returns the bytes of a model's file or files, a little more where the graph is small.

    Args:
        model: not yet saved; no weight is computed.
        quantized: whether the weights that are quantized count.
    """
    total = _LEAST + _text(model.metadata_props) + sum(_text(f.metadata_props) for f in model.functions.values())
    for graph in model.graphs():
        total += _text(graph.metadata_props) + sum(map(_declared, (*graph.inputs, *graph.outputs)))
        for value in graph.initializers.values():
            total += 64 + len(value.name or "") + _declared(value)
            if value.const_value is not None and (quantized or not isinstance(value.const_value, PartTensor)):
                total += value.const_value.nbytes
        for node in graph:
            total += len(ir.serde.serialize_node(node).SerializeToString()) + 8
            total += sum(map(_declared, node.outputs))
    return total


def _declared(value: ir.Value) -> int:
    return len(ir.serde.serialize_value(value).SerializeToString()) + 8 if value.name else 0


def _text(metadata: Mapping[str, str]) -> int:
    return sum(len(key.encode()) + len(text.encode()) + 16 for key, text in metadata.items())


def bytes_in(job: QuantizationJob, spec: WeightSpec) -> int:
    """Returns what a weight takes in a form."""
    n, k = job.shape
    blocks = -(-k // (spec.block_size or k))
    zeros = 0 if spec.symmetric else -(-blocks * spec.bits // 8)
    return n * (-(-k * spec.bits // 8) + blocks * job.context.scale_dtype.itemsize + zeros)


def mean_errors(jobs: Iterable[QuantizationJob], specs: Sequence[WeightSpec]) -> list[float]:
    """Measures what a group would lose in each form: the sum, over its roles, of the mean of some weights.

    Those that saw most are looked at, as others tell little.
    """
    by_role: dict[str, list[QuantizationJob]] = {}
    for job in jobs:
        by_role.setdefault(job.context.role, []).append(job)
    total = np.zeros(len(specs))
    for found in by_role.values():
        some = sorted(found, key=lambda job: -getattr(job.context.activations, "count", 0))[:JOBS]
        total += np.mean([_errors(job, specs) for job in some], axis=0)
    return [float(error) for error in total]


def _errors(job: QuantizationJob, specs: Sequence[WeightSpec]) -> list[float]:
    """Returns the squared error of a few rows' outputs, or of the weights, over their squares, in each form."""
    n, k = job.shape
    rows = min(n, ROWS)
    stored = job.weight.slice(0, 0, rows, max(1, n // rows)).numpy()
    seen = None
    if job.context.activations is not None and (inputs := job.context.activations()).any():
        seen = Inputs(inputs[:: max(1, len(inputs) // INPUTS)], job.context.weight, k)

    def outputs(weight: FloatArray) -> FloatArray:
        return weight if seen is None else seen() @ weight.T

    weight = stored.astype(np.float32)
    whole = _squares(outputs(weight))
    if not whole:
        return [0.0] * len(specs)
    contexts = (replace(job.context, spec=spec, activations=seen) for spec in specs)
    rests = (job.quantizer(stored, context).dequantize() - weight for context in contexts)
    return [_squares(outputs(rest)) / whole for rest in rests]


def _squares(values: FloatArray) -> float:
    return float(np.square(values, dtype=np.float64).sum())
