"""What each group of weights would lose in each form that it may have.

A few rows of a few of its weights are quantized in every form, and the error of their outputs on the calibration's
inputs is measured, relative to the outputs; without a calibration, that of the weights. Each role's error counts by its
sensitivity.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rewriter import api
from rewriter.budget import kept, sensitivity
from rewriter.budget.forms import Budget, Form, Group, worth_taking
from rewriter.budget.samples import bytes_in, group_jobs, mean_errors, model_bytes, quantized_jobs
from rewriter.calibration import Calibration
from rewriter.errors import UsageError
from rewriter.io import Model
from rewriter.quantize.formats import INT
from rewriter.quantize.job import QuantizationJob
from rewriter.quantize.plan import Override, Selector
from rewriter.quantize.types import WeightSpec
from rewriter.result import Result
from rewriter.ruleset import RuleSet

BLOCKS = (16, 32, 64, 128, 256)

_LINE = 160
"""Bytes that the written model takes for each line of its plan, which it holds as text."""

Key = tuple[str, int | None]
Tell = Callable[[str], None]


def measure(
    model: Model,
    rule_set: RuleSet,
    *,
    calibration: str | os.PathLike[str] | Calibration | None = None,
    require: Callable[[Budget], None] = lambda outline: None,
    tell: Tell = lambda stage: None,
    **options: Any,
) -> Budget:
    """Measures what each group of weights would lose in each form; what a calibration tells is kept in its folder.

    Args:
        model: as ``apply`` takes it.
        rule_set: says what is quantized, by which algorithm, and for which target.
        calibration: what the weights saw, or the folder that ``calibrate`` wrote.
        require: raises where the sizes alone, which are known at once, show that the budget is of no use.
        tell: told what is done, stage by stage.
        options: of ``apply``: imatrix, target.

    Raises:
        UsageError: the rule set quantizes nothing.
    """
    seen = Calibration.open(calibration) if isinstance(calibration, str | os.PathLike) else calibration
    file = kept.place(model, rule_set, seen, options)
    found = kept.read(file)
    if found is not None:
        require(found)
        return found
    tell("finding the forms that weights may have")
    result = api.apply(model, rule_set, prover=lambda *_: None, calibration=seen, **options)
    jobs = [job for job in quantized_jobs(result) if job.context.role]
    if not jobs:
        raise UsageError(f"rule set '{rule_set.name}' quantizes no weight of a known role: no budget can be shared")
    grouped = group_jobs(jobs)
    others = sum(bytes_in(job, job.context.spec) for job in quantized_jobs(result) if not job.context.role)
    graphs = _graphs(model, rule_set, grouped, **options)
    whole = _whole_rows(model, rule_set, grouped, **options)
    rest = min(size for sizes in graphs.values() for size in sizes.values())
    experts = sum(len(found) for (role, _), found in grouped.items() if role == "expert*")
    sizes: dict[Key, dict[WeightSpec, int]] = {}
    for key, members in grouped.items():
        share = len(members) / experts if key[0] == "expert*" else 0.0
        more = {bits: int(share * (size - rest)) for bits, size in graphs[key].items()}
        specs = _specs(members, more, whole=key in whole)
        sizes[key] = {spec: sum(bytes_in(job, spec) for job in members) + more[spec.bits] for spec in specs}

    def budget(errors: Mapping[Key, Sequence[float]], tokens: int = 0) -> Budget:
        groups = []
        for key, members in grouped.items():
            forms = (
                Form(spec, size, error) for (spec, size), error in zip(sizes[key].items(), errors[key], strict=True)
            )
            groups.append(Group(*key, worth_taking(forms), len(members)))
        return Budget(tuple(groups), sum(job.weight.size for job in jobs), rest + others + _LINE * len(grouped), tokens)

    require(budget({key: [-size for size in found.values()] for key, found in sizes.items()}))
    weights, tokens = sensitivity.measured(model, rule_set, (role for role, _ in grouped), seen, tell, **options)
    errors = {}
    for index, (key, members) in enumerate(grouped.items(), 1):
        tell(f"measuring what each form loses, {index} of {len(grouped)}")
        weight = weights[key[0]] if weights else sensitivity.known(key[0])
        errors[key] = [weight * error for error in mean_errors(members, list(sizes[key]))]
    made = budget(errors, tokens)
    kept.write(file, made)
    return made


def _graphs(
    model: Model, rule_set: RuleSet, grouped: Mapping[Key, Sequence[QuantizationJob]], **options: Any
) -> dict[Key, dict[int, int]]:
    """Returns the widths that each group may have, with the bytes of all but weights where everything has that width.

    Experts that the target does not run fused in some width take a node for each matrix.
    """
    found: dict[Key, dict[int, int]] = {key: {} for key in grouped}
    for bits in INT.widths:
        result = _planned(model, rule_set, Override(Selector(role=("?*",)), {"bits": bits}), **options)
        size = model_bytes(result.ir_model, quantized=False)
        for key, jobs in group_jobs(quantized_jobs(result)).items():
            if len(jobs) == len(grouped.get(key, ())) and all(job.context.spec.bits == bits for job in jobs):
                found[key][bits] = size
    return {key: sizes or {grouped[key][0].context.spec.bits: size} for key, sizes in found.items()}


def _whole_rows(
    model: Model, rule_set: RuleSet, grouped: Mapping[Key, Sequence[QuantizationJob]], **options: Any
) -> set[Key]:
    """Returns the groups that may have one scale for a whole row, as experts in one node."""
    result = _planned(model, rule_set, Override(Selector(role=("expert*",)), {"block_size": 0}), **options)
    found = group_jobs(quantized_jobs(result)).items()
    return {key for key, jobs in found if key in grouped and all(job.context.spec.block_size == 0 for job in jobs)}


def _planned(model: Model, rule_set: RuleSet, override: Override, **options: Any) -> Result[Any]:
    plan = replace(rule_set.plan, overrides=(*rule_set.plan.overrides, override))
    return api.apply(model, replace(rule_set, plan=plan), prover=lambda *_: None, **options)


def _specs(jobs: Sequence[QuantizationJob], widths: Mapping[int, int], *, whole: bool) -> list[WeightSpec]:
    planned = jobs[0].context.spec
    if planned.format != INT.name:
        return [planned]
    blocks = [block for block in BLOCKS if all(job.shape[1] % block == 0 for job in jobs)] or [planned.block_size]
    forms = [
        (bits, block, symmetric)
        for bits in widths
        for block in (*blocks, *([0] if whole and 0 not in blocks else []))
        for symmetric in (True, False)
    ]
    return [
        replace(planned, bits=bits, block_size=block, symmetric=symmetric)
        for bits, block, symmetric in forms
        if bits < 8 or symmetric  # zero points gain nothing there
    ]
