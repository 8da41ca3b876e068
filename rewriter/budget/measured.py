"""A budget in place of a plan: each weight's form is chosen so that the error is least under a number of bytes.

Weights that must be alike (the experts of a layer) or that are (one role in one layer) form a group. For every form
that a group may have, a few rows of a few of its weights are quantized, and the error of their outputs on the
calibration's inputs is measured, relative to the outputs; without a calibration, that of the weights. Starting from the
fewest bytes, the step that saves most error for each byte is taken again and again, for as long as it fits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import onnx_ir as ir

from rewriter import api
from rewriter.api import Result
from rewriter.errors import UsageError
from rewriter.io import Model
from rewriter.quantize.job import PartTensor, QuantizationJob
from rewriter.quantize.types import WeightSpec
from rewriter.ruleset import RuleSet

JOBS, ROWS, INPUTS = 4, 64, 2048
"""Weights of each role of a group, rows of each, and inputs that are looked at."""

BLOCKS = (16, 32, 64, 128)
SENSITIVE = {"lm_head": 7.0, "embedding": 3.0, "attention.o": 2.0, "attention.*": 8.0}
"""How often the error of a role counts: by how much KL a trained model gained for it, that of experts being 1."""


@dataclass(frozen=True)
class Form:
    """One form that a group may have: its bytes, and the error that it is expected to make."""

    spec: WeightSpec
    nbytes: int
    error: float


@dataclass(frozen=True)
class Group:
    """Weights that get one form.

    Attributes:
        role: glob on their role.
        layer: index of their layer, or None.
        forms: from the fewest bytes on, each with less error for each byte than the step before.
        count: how many weights.
    """

    role: str
    layer: int | None
    forms: tuple[Form, ...]
    count: int = 1


@dataclass(frozen=True)
class Choice:
    """What a budget chose.

    Attributes:
        forms: of each group.
        nbytes: of the whole model, as expected.
        error: sum of the groups' expected errors.
    """

    forms: Mapping[Group, Form]
    nbytes: int
    error: float


@dataclass(frozen=True)
class Budget:
    """The groups of a model's weights, and what the rest of it takes.

    Attributes:
        groups: in the order of the model.
        elements: numbers in all of them.
        rest: bytes of what is not quantized, and of the graph.
    """

    groups: tuple[Group, ...]
    elements: int
    rest: int

    def choose(self, nbytes: int) -> Choice:
        """Returns the forms of least error whose model takes at most ``nbytes``.

        Raises:
            UsageError: the smallest forms take more.
        """
        place = dict.fromkeys(self.groups, 0)
        used = self.rest + sum(group.forms[0].nbytes for group in self.groups)
        if used > nbytes:
            raise UsageError(f"a budget of {nbytes:,} bytes is too small: the smallest forms take {used:,}")
        steps = [
            ((a.error - b.error) / (b.nbytes - a.nbytes), number, index, group)
            for number, group in enumerate(self.groups)
            for index, (a, b) in enumerate(zip(group.forms, group.forms[1:], strict=False), 1)
        ]
        for _, _, index, group in sorted(steps, key=lambda step: (-step[0], *step[1:3])):
            more = group.forms[index].nbytes - group.forms[index - 1].nbytes
            if place[group] == index - 1 and used + more <= nbytes:
                place[group] = index
                used += more
        forms = {group: group.forms[index] for group, index in place.items()}
        return Choice(forms, used, sum(form.error for form in forms.values()))

    def bytes_of(self, bits: float) -> int:
        """Returns the bytes of a model whose quantized weights take ``bits`` each, scales and zero points included."""
        return self.rest + int(self.elements * bits / 8)


def measure(model: Model, rule_set: RuleSet, **options: Any) -> Budget:
    """Measures what each group of weights would lose in each form.

    Args:
        model: as ``apply`` takes it.
        rule_set: says what is quantized, by which algorithm, and for which target.
        options: of ``apply``: calibration, imatrix, target.

    Raises:
        UsageError: the rule set quantizes nothing.
    """
    result = api.apply(model, rule_set, prover=lambda *_: None, **options)
    jobs = [job for job in quantized_jobs(result) if job.context.role]
    if not jobs:
        raise UsageError(f"rule set '{rule_set.name}' quantizes no weight of a known role: no budget can be shared")
    grouped = group_jobs(jobs)
    groups = tuple(Group(role, layer, _forms(role, found), len(found)) for (role, layer), found in grouped.items())
    elements = sum(job.weight.size for job in jobs)
    others = sum(_nbytes(job, job.context.spec) for job in quantized_jobs(result) if not job.context.role)
    return Budget(groups, elements, model_bytes(result.ir_model, quantized=False) + others)


def group_jobs(jobs: Sequence[QuantizationJob]) -> dict[tuple[str, int | None], list[QuantizationJob]]:
    """Returns the weights by role and layer; all those of the experts of a layer are one group."""
    grouped: dict[tuple[str, int | None], list[QuantizationJob]] = {}
    for job in jobs:
        role = job.context.role
        grouped.setdefault(("expert*" if role.startswith("expert") else role, job.context.layer), []).append(job)
    return grouped


def quantized_jobs(result: Result[Any]) -> list[QuantizationJob]:
    """Returns the weights that a rewritten model will quantize when it is saved."""
    tensors = (value.const_value for graph in result.ir_model.graphs() for value in graph.initializers.values())
    parts = (tensor for tensor in tensors if isinstance(tensor, PartTensor))
    return list({job.key: job for tensor in parts for job in tensor.jobs}.values())


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


def _forms(role: str, jobs: Sequence[QuantizationJob]) -> tuple[Form, ...]:
    """Measures the forms of a group, and leaves those that no budget would take out."""
    by_role: dict[str, list[QuantizationJob]] = {}
    for job in jobs:
        by_role.setdefault(job.context.role, []).append(job)
    samples = [_samples(found) for found in by_role.values()]
    forms = []
    for spec in _specs(jobs):
        error = sum(float(np.mean([sample.error(spec) for sample in found])) for found in samples)
        forms.append(Form(spec, sum(_nbytes(job, spec) for job in jobs), _weight(role) * error))
    return _hull(forms)


def _weight(role: str) -> float:
    return next((weight for pattern, weight in SENSITIVE.items() if fnmatchcase(role, pattern)), 1.0)


def _specs(jobs: Sequence[QuantizationJob]) -> list[WeightSpec]:
    planned = jobs[0].context.spec
    blocks = [block for block in BLOCKS if all(job.shape[1] % block == 0 for job in jobs)] or [planned.block_size]
    forms = [(bits, block, symmetric) for bits in (2, 4) for block in blocks for symmetric in (True, False)]
    forms += [(8, block, True) for block in blocks]
    return [replace(planned, bits=b, block_size=block, symmetric=s) for b, block, s in forms]


def _nbytes(job: QuantizationJob, spec: WeightSpec) -> int:
    n, k = job.shape
    blocks = -(-k // (spec.block_size or k))
    zeros = 0 if spec.symmetric else -(-blocks * spec.bits // 8)
    return n * (-(-k * spec.bits // 8) + blocks * job.context.scale_dtype.itemsize + zeros)


def _hull(forms: Iterable[Form]) -> tuple[Form, ...]:
    """Returns the forms on the lower convex hull of error over bytes."""
    hull: list[Form] = []
    for form in sorted(forms, key=lambda f: (f.nbytes, f.error)):
        if hull and form.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], form):
            hull.pop()
        if hull and hull[-1].nbytes == form.nbytes:
            hull.pop()
        hull.append(form)
    return tuple(hull)


def _gain(a: Form, b: Form) -> float:
    return (a.error - b.error) / max(b.nbytes - a.nbytes, 1)


class _Sample:
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


def _samples(jobs: Sequence[QuantizationJob]) -> list[_Sample]:
    """Those that saw most come first: an expert that saw nothing tells nothing."""
    seen = sorted(jobs, key=lambda job: -getattr(job.context.activations, "count", 0))
    return [_Sample(job) for job in seen[:JOBS]]
