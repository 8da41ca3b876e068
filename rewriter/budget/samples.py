"""The weights of a model that is to be quantized: who they are, what they take, and samples that say what they lose."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from rewriter.api import Result
from rewriter.quantize.job import PartTensor, QuantizationJob
from rewriter.quantize.types import WeightSpec

JOBS, ROWS, INPUTS = 4, 64, 2048
"""Weights of each role of a group, rows of each, and inputs that are looked at."""


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
    total = 4096
    for graph in model.graphs():
        for value in graph.initializers.values():
            total += 64 + len(value.name or "")
            if value.const_value is not None and (quantized or not isinstance(value.const_value, PartTensor)):
                total += value.const_value.nbytes
        for node in graph:
            total += len(ir.serde.serialize_node(node).SerializeToString()) + 8
            total += sum(len(ir.serde.serialize_value(v).SerializeToString()) + 8 for v in node.outputs if v.name)
    return total


def bytes_in(job: QuantizationJob, spec: WeightSpec) -> int:
    """Returns what a weight takes in a form."""
    n, k = job.shape
    blocks = -(-k // (spec.block_size or k))
    zeros = 0 if spec.symmetric else -(-blocks * spec.bits // 8)
    return n * (-(-k * spec.bits // 8) + blocks * job.context.scale_dtype.itemsize + zeros)


class Sample:
    """Some rows of a weight, and what it saw."""

    def __init__(self, job: QuantizationJob) -> None:
        n, _ = job.shape
        rows = min(n, ROWS)
        self._job = job
        self._weight = job.weight.slice(0, 0, rows, max(1, n // rows)).numpy()
        inputs = None if job.context.activations is None else job.context.activations()
        self._inputs = None if inputs is None or not inputs.any() else inputs[:: max(1, len(inputs) // INPUTS)]

    def error(self, spec: WeightSpec) -> float:
        """Returns the squared error of the outputs, or of the weights, over their squares."""
        inputs = self._inputs
        context = replace(self._job.context, spec=spec, activations=None if inputs is None else lambda: inputs)
        weight = np.asarray(self._weight, np.float32)
        rest = self._job.quantizer(self._weight, context).dequantize() - weight
        if inputs is not None:
            rest, weight = inputs @ rest.T, inputs @ weight.T
        whole = float(np.square(weight, dtype=np.float64).sum())
        return float(np.square(rest, dtype=np.float64).sum()) / whole if whole else 0.0


def samples(jobs: Iterable[QuantizationJob]) -> list[list[Sample]]:
    """Returns samples of the weights of a group by role; those that saw most, as others tell little."""
    by_role: dict[str, list[QuantizationJob]] = {}
    for job in jobs:
        by_role.setdefault(job.context.role, []).append(job)
    return [
        [Sample(job) for job in sorted(found, key=lambda job: -getattr(job.context.activations, "count", 0))[:JOBS]]
        for found in by_role.values()
    ]


def mean_errors(found: Iterable[Sequence[Sample]], spec: WeightSpec) -> float:
    """Returns the sum, over the roles of a group, of the mean error of the samples in one form."""
    return sum(float(np.mean([sample.error(spec) for sample in some])) for some in found)
