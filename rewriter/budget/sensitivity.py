"""How much an error of each role of weights does to what a model says.

The weights of one role after another are rounded to four bits, all others left in float, and the model is run on a few
of the tokens that it was calibrated on. The KL divergence of its output over the errors that were made is the role's
sensitivity: errors times sensitivities are then expected divergences, which add up as long as they are small.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rewriter import api, io
from rewriter.budget.samples import group_jobs, mean_errors, quantized_jobs
from rewriter.calibration import Calibration
from rewriter.errors import TargetError
from rewriter.parity.model import read
from rewriter.parity.quality import Baseline, logits_of
from rewriter.quantize.plan import QuantizationPlan, Selector
from rewriter.quantize.types import WeightSpec
from rewriter.ruleset import RuleSet

PROBE = WeightSpec("rtn", 4, 32)
"""The form to which a role is rounded: its error is small beside the weight, and large beside what floats lose."""

KNOWN = {"lm_head": 12.0, "embedding": 3.0, "attention.o": 1.0, "attention.*": 5.0}
"""Sensitivities of roles where there is nothing to run, that of experts being 1: those of one trained model."""


def known(role: str) -> float:
    """Returns the sensitivity of a role, as it is known of another model."""
    return next((weight for pattern, weight in KNOWN.items() if fnmatchcase(role, pattern)), 1.0)


def measured(
    model: io.Model,
    rule_set: RuleSet,
    roles: Iterable[str],
    calibration: Calibration | None,
    tell: Callable[[str], None] = lambda stage: None,
    **options: Any,
) -> tuple[Mapping[str, float], int]:
    """Measures the sensitivity of each role.

    Args:
        model: the float model.
        rule_set: says what may be quantized; whatever its target, the model is run by the runtime that is installed.
        roles: globs on roles, each of which is looked at.
        calibration: has a few of the tokens.
        tell: told what is done.
        options: of ``apply``: imatrix.

    Returns:
        KL divergence in nats for each unit of relative squared output error, by role, and the number of tokens; nothing
        where there are no tokens, no logits, or nothing that runs the model.
    """
    tokens = None if calibration is None else calibration.sample()
    source = io.held(model)
    if tokens is None or logits_of(read(source)) is None:
        return {}, 0
    found: dict[str, float] = {}
    wanted = list(dict.fromkeys(roles))
    with tempfile.TemporaryDirectory() as folder:
        baseline = Baseline(source, tokens, Path(folder))
        for index, role in enumerate(wanted, 1):
            tell(f"measuring sensitivities, {role} ({index} of {len(wanted)})")
            plan = QuantizationPlan(PROBE, include=(Selector(role=(role,)),), exclude=rule_set.plan.exclude)
            probe = replace(rule_set, plan=plan, rounded_activations=False)
            known_to = {**options, "target": "auto", "calibration": calibration}
            result = api.apply(model, probe, prover=lambda *_: None, **known_to)
            jobs = group_jobs(quantized_jobs(result)).values()
            error = sum(mean_errors(some, [PROBE])[0] for some in jobs)
            try:
                divergence = baseline.measure(result.ir_model).kl.value
            except TargetError:  # this machine does not run the model, which a GPU calibrated
                return {}, 0
            found[role] = divergence / error if error else -1.0
    most = max(found.values(), default=0.0)
    return {role: weight if weight >= 0 else most for role, weight in found.items()}, tokens.size
