"""What a rewritten model will hold once its weights are computed, told from the shapes alone."""

from __future__ import annotations

import math

import onnx_ir as ir

from rewriter.engine.context import weight_record
from rewriter.graph.contents import stored_tensors
from rewriter.quantize.job import PartTensor
from rewriter.report import Weight


def planned(model: ir.Model) -> tuple[Weight, ...]:
    """Returns the weights that will be quantized; their errors are NaN until they have been."""
    found: dict[object, Weight] = {}
    sizes: dict[object, int] = {}
    for slot in stored_tensors(model):
        tensor = slot.tensor
        if not isinstance(tensor, PartTensor):
            continue
        jobs = tensor.jobs if tensor.stacked else tensor.jobs[:1]  # others are equal to the first
        for job in jobs:
            sizes[job.key] = sizes.get(job.key, 0) + tensor.nbytes // len(jobs)
            found[job.key] = weight_record(job, sizes[job.key], math.nan)
    return tuple(found.values())
