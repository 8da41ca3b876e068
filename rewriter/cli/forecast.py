"""What a rewritten model will hold once its weights are computed, told from the shapes alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from rewriter.quantize.job import PartTensor
from rewriter.report import Report, Weight
from rewriter.run import weight_record
from rewriter.stored import stored_tensors


@dataclass(frozen=True)
class Left:
    """A weight that stays float.

    Attributes:
        name: its name.
        nbytes: its size.
        reason: why, as far as a rule has said.
        readers: operators that read it.
    """

    name: str
    nbytes: int
    reason: str
    readers: tuple[str, ...]


def planned(model: ir.Model) -> tuple[Weight, ...]:
    """Returns the weights that will be quantized; their errors are NaN until they have been."""
    found: dict[object, Weight] = {}
    sizes: dict[object, int] = {}
    for slot in stored_tensors(model):
        tensor = slot.tensor
        if not isinstance(tensor, PartTensor):
            continue
        for job in tensor.jobs:
            sizes[job.key] = sizes.get(job.key, 0) + tensor.nbytes // len(tensor.jobs)
            found[job.key] = weight_record(job, sizes[job.key], math.nan)
    return tuple(found.values())


def left_in_float(model: ir.Model, report: Report) -> list[Left]:
    """Returns the matrices and stacks that stay float, the largest first."""
    reasons = {decline.node: decline.reason for decline in reversed(report.declines)}
    found = []
    for value in _initializers(model):
        tensor = value.const_value
        if tensor is None or isinstance(tensor, PartTensor) or not tensor.dtype.is_floating_point():
            continue
        if tensor.shape.rank() > 1:
            nodes = [use.node for use in value.uses()]
            reason = next((reasons[n.name] for n in nodes if n.name in reasons), "")
            found.append(Left(value.name or "", tensor.nbytes, reason, tuple(dict.fromkeys(n.op_type for n in nodes))))
    return sorted(found, key=lambda left: (-left.nbytes, left.name))


def _initializers(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.initializers.values()
