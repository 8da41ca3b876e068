"""What the tables of targets say of the forms that the prober measured, and on what it ran."""

from __future__ import annotations

import functools
from pathlib import Path

from probe import answers
from probe.forms import Form, LinearForm, LookupForm, MoEForm, QMoEForm

from rewriter.operators.form import ExpertForm
from rewriter.quantize.types import QuantizedShape
from rewriter.target import Target

ROOT = Path(__file__).resolve().parents[2]
RUNS, ROUNDS = "runs", "rounds"


@functools.cache
def measured() -> tuple[answers.Answers, ...]:
    """Returns every file of answers, in the order of versions."""
    found = answers.read_all(ROOT / "benchmarks" / "prober" / "measured")
    return tuple(sorted(found, key=lambda own: (own.provider, target_of(own).version)))


def target_of(found: answers.Answers) -> Target:
    """Returns the target that answered."""
    return Target.parse(f"{found.provider}@{'.'.join(found.version.split('.')[:2])}")


def expert_form(form: MoEForm) -> ExpertForm:
    """Returns what a form of MoE or QMoE computes."""
    alpha, beta, limit = map(float, form.constants.split(","))
    return ExpertForm(
        k=form.top,
        activation=form.act,
        alpha=alpha,
        beta=beta,
        limit=limit,
        fusion=form.fusion,
        normalize=form.normalize,
        sparse_mixer=form.sparse,
        gated=form.fc3,
    )


def told(target: Target, form: Form) -> str | None:
    """Returns what the tables say of a form: ``RUNS``, ``ROUNDS``, or why not; None where they are not asked."""
    if isinstance(form, LinearForm):
        return _linear(target, form)
    if isinstance(form, LookupForm):
        return target.lookup.refusal(form.x, form.k, form.bits, form.block, symmetric=form.zeros == "none") or RUNS
    weighted = isinstance(form, QMoEForm) and form.weights
    kernels = target.runs(form.operator, expert_form(form), form.x, weighted=weighted)
    if isinstance(kernels, str):
        return kernels
    if not isinstance(form, QMoEForm):
        return RUNS
    written = ("auto",) if form.quant == "int" else (str(int(form.layout == "raw")),)
    if form.prepacked not in written:
        return None
    if form.level and not target.has("QMoE", "accuracy_level"):
        return "it has no accuracy_level"
    reasons = [kernel.cannot_hold(_shapes(form), _layout(form)) for kernel in kernels]
    fitting = [kernel for kernel, reason in zip(kernels, reasons, strict=True) if reason is None]
    if not fitting:
        return reasons[0]
    return ROUNDS if any(fitting[0].rounds_activations(bits, form.block, form.level) for bits in form.bits) else RUNS


def _linear(target: Target, form: LinearForm) -> str | None:
    if form.zeros == "float" or form.flat or form.level == 1:
        return None
    if form.bias and not target.linear.takes_bias:
        return "it reads no bias"
    symmetric = form.zeros == "none"
    reason = target.linear.refusal(form.x, form.bits, form.block, symmetric=symmetric, layout=_layout(form))
    return reason or (ROUNDS if form.level == 4 else RUNS)


def _layout(form: LinearForm | QMoEForm) -> str:
    return f"cutlass-{form.layout}" if form.layout.startswith("sm") else form.layout


def _shapes(form: QMoEForm) -> list[QuantizedShape]:
    own = expert_form(form)
    sizes = [(own.fused * form.i, form.h), (form.h, form.i), *[(form.i, form.h)] * form.fc3]
    zeros = [form.zeros in ("all", f"fc{index}") for index in (1, 2, 3)]
    return [
        QuantizedShape(*size, form.bits[i % 2], form.block, not zeros[i], form.quant) for i, size in enumerate(sizes)
    ]
