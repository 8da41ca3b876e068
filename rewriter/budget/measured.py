"""What each group of weights would lose in each form that it may have.

A few rows of a few of its weights are quantized in every form, and the error of their outputs on the calibration's
inputs is measured, relative to the outputs; without a calibration, that of the weights. Each role's error counts by its
sensitivity.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rewriter import api
from rewriter.budget import sensitivity
from rewriter.budget.forms import Budget, Form, Group, worth_taking
from rewriter.budget.samples import bytes_in, group_jobs, mean_errors, model_bytes, quantized_jobs
from rewriter.calibration import Calibration
from rewriter.errors import UsageError
from rewriter.io import Model
from rewriter.quantize.formats import INT
from rewriter.quantize.job import QuantizationJob
from rewriter.quantize.plan import Override, Selector
from rewriter.quantize.types import WeightSpec
from rewriter.ruleset import RuleSet

BLOCKS = (16, 32, 64, 128)

Key = tuple[str, int | None]


def measure(
    model: Model,
    rule_set: RuleSet,
    *,
    calibration: str | os.PathLike[str] | Calibration | None = None,
    **options: Any,
) -> Budget:
    """Measures what each group of weights would lose in each form.

    Args:
        model: as ``apply`` takes it.
        rule_set: says what is quantized, by which algorithm, and for which target.
        calibration: what the weights saw, or the folder that ``calibrate`` wrote.
        options: of ``apply``: imatrix, target.

    Raises:
        UsageError: the rule set quantizes nothing.
    """
    seen = Calibration.open(calibration) if isinstance(calibration, str | os.PathLike) else calibration
    result = api.apply(model, rule_set, prover=lambda *_: None, calibration=seen, **options)
    jobs = [job for job in quantized_jobs(result) if job.context.role]
    if not jobs:
        raise UsageError(f"rule set '{rule_set.name}' quantizes no weight of a known role: no budget can be shared")
    grouped = group_jobs(jobs)
    others = sum(bytes_in(job, job.context.spec) for job in quantized_jobs(result) if not job.context.role)
    graphs = _graphs(model, rule_set, grouped, **options)
    rest = min(size for sizes in graphs.values() for size in sizes.values())
    weights, tokens = sensitivity.measured(model, rule_set, (role for role, _ in grouped), seen, **options)
    experts = sum(len(found) for (role, _), found in grouped.items() if role == "expert*")
    groups = []
    for (role, layer), found in grouped.items():
        share = len(found) / experts if role == "expert*" else 0.0
        more = {bits: int(share * (size - rest)) for bits, size in graphs[role, layer].items()}
        weight = weights[role] if weights else sensitivity.known(role)
        groups.append(Group(role, layer, _forms(found, more, weight), len(found)))
    return Budget(tuple(groups), sum(job.weight.size for job in jobs), rest + others, tokens)


def _graphs(
    model: Model, rule_set: RuleSet, grouped: Mapping[Key, Sequence[QuantizationJob]], **options: Any
) -> dict[Key, dict[int, int]]:
    """Returns the widths that each group may have, with the bytes of all but weights where everything has that width.

    Experts that the target does not run fused in some width take a node for each matrix.
    """
    found: dict[Key, dict[int, int]] = {key: {} for key in grouped}
    for bits in INT.widths:
        plan = rule_set.plan
        plan = replace(plan, overrides=(*plan.overrides, Override(Selector(role=("?*",)), {"bits": bits})))
        result = api.apply(model, replace(rule_set, plan=plan), prover=lambda *_: None, **options)
        size = model_bytes(result.ir_model, quantized=False)
        for key, jobs in group_jobs(quantized_jobs(result)).items():
            if len(jobs) == len(grouped.get(key, ())) and all(job.context.spec.bits == bits for job in jobs):
                found[key][bits] = size
    return {key: sizes or {grouped[key][0].context.spec.bits: size} for key, sizes in found.items()}


def _forms(jobs: Sequence[QuantizationJob], more: Mapping[int, int], weight: float) -> tuple[Form, ...]:
    """Measures the forms of a group, and leaves out those that no budget would take."""
    specs = _specs(jobs, more)
    return worth_taking(
        Form(spec, sum(bytes_in(job, spec) for job in jobs) + more[spec.bits], weight * error)
        for spec, error in zip(specs, mean_errors(jobs, specs), strict=True)
    )


def _specs(jobs: Sequence[QuantizationJob], widths: Mapping[int, int]) -> list[WeightSpec]:
    planned = jobs[0].context.spec
    if planned.format != INT.name:
        return [planned]
    blocks = [block for block in BLOCKS if all(job.shape[1] % block == 0 for job in jobs)] or [planned.block_size]
    forms = [(bits, block, symmetric) for bits in widths for block in blocks for symmetric in (True, False)]
    return [
        replace(planned, bits=bits, block_size=block, symmetric=symmetric)
        for bits, block, symmetric in forms
        if bits < 8 or symmetric  # zero points gain nothing there
    ]
