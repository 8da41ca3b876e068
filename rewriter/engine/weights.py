"""What a report says of quantized weights: measured, or told from the shapes alone before they are computed."""

from __future__ import annotations

import math

import onnx_ir as ir

from rewriter.graph.contents import stored_tensors
from rewriter.quantize import ALGORITHMS, lossless
from rewriter.quantize.job import PartTensor, QuantizationJob
from rewriter.quantize.measured import Measured
from rewriter.quantize.plan import CUSTOM
from rewriter.report import KEPT, Weight


def weight_record(job: QuantizationJob, measured: Measured) -> Weight:
    """Returns what a report says of one weight, by what became of it."""
    context, instead = job.context, measured.algorithm
    spec = context.spec
    planned = spec.algorithm if job.quantizer is ALGORITHMS.get(spec.algorithm) else CUSTOM
    return Weight(
        name=context.weight,
        sources=context.sources,
        node=context.node,
        role=context.role,
        layer=context.layer,
        expert=context.expert,
        shape=job.shape,
        algorithm=instead or planned,
        bits=spec.bits,
        format=spec.format,
        block_size=spec.block_size,
        symmetric=spec.symmetric,
        planned_block_size=None if context.planned is None else context.planned.block_size,
        planned_algorithm=planned if instead else None,
        uncalibrated=(context.uncalibrated or "no token came by") if instead else "",
        planned_form="" if context.planned is None or context.planned.form == spec.form else context.planned.form,
        form=spec.form,
        because=context.because,
        bytes_before=job.weight.nbytes,
        bytes_after=measured.nbytes,
        relative_rms=measured.relative_rms,
        output_rms=measured.output_rms,
        grid=KEPT if planned == lossless.NAME else context.off_grid,
    )


def planned(model: ir.Model) -> list[Weight]:
    """Returns the weights that will be quantized; errors are NaN until they have been."""
    return [weight_record(job, Measured(nbytes, math.nan)) for job, nbytes in jobs_of(model).values()]


def jobs_of(model: ir.Model) -> dict[tuple[object, ...], tuple[QuantizationJob, int]]:
    """Returns what will quantize the weights of the model, by its key, each with the bytes that it will give."""
    found: dict[tuple[object, ...], tuple[QuantizationJob, int]] = {}
    for slot in stored_tensors(model):
        tensor = slot.tensor
        if not isinstance(tensor, PartTensor):
            continue
        jobs = tensor.jobs if tensor.stacked else tensor.jobs[:1]  # others are equal to the first
        share = tensor.nbytes // len(jobs)
        for job in jobs:
            key = job.key
            _, before = found.get(key, (job, 0))
            found[key] = job, before + share
    return found
