"""Which rule set should I take? Each is run, written to a temporary folder, measured and removed."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rewriter import api, io
from rewriter.errors import ParityError, RewriterError, UsageError
from rewriter.graph.contents import total_bytes
from rewriter.parity.quality import Baseline, logits_of
from rewriter.parity.runtime import Array, OrtRuntime, available
from rewriter.report import Report, Weight
from rewriter.report.candidates import Candidate, Candidates
from rewriter.ruleset import RuleSetLike, load
from rewriter.target import Target

LARGEST = 1 << 30
"""Bytes of a model above which outputs are compared on tokens only."""


def compare(
    model: io.Model,
    rules: Sequence[RuleSetLike],
    *,
    tokens: Array | None = None,
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> Candidates:
    """Rewrites a model by several rule sets and measures each result: size, errors of weights and outputs, time.

    Each result lies in the system's temporary folder while it is measured. Rewrites are not proved: that is not what is
    asked here.

    Args:
        model: as for ``rewriter.apply``.
        rules: at least one rule set, each as for ``rewriter.apply``.
        tokens: [sequences, length] ids, for perplexity, KL divergence and top-1 agreement. Without them, a model of at
            most 1 GiB is run on random inputs.
        progress: told what is being done.
        options: of ``rewriter.apply``: target, calibration, imatrix, overrides.

    Raises:
        UsageError: there is no rule set, or the tokens are none of the model's.
        ModelError: the model is unreadable or invalid.
    """
    if isinstance(rules, str | os.PathLike) or not rules:
        raise UsageError("give the rule sets to compare as a list, as ['rtn', 'k-quant']")
    told = progress or (lambda text: None)
    held = io.held(model)
    original = io.as_model(held)
    nbytes = total_bytes(original)
    rows: list[Candidate] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "logits").mkdir()
        baseline = None if tokens is None else Baseline(held, tokens, place / "logits")
        for index, one in enumerate(rules):
            rows.append(_candidate(held, one, place / str(index), baseline, told, small=nbytes <= LARGEST, **options))
    name = os.fspath(model) if isinstance(model, str | os.PathLike) else original.graph.name or ""
    measured = (row.quality.tokens for row in rows if row.quality is not None)
    return Candidates(name, nbytes, next(measured, 0), tuple(rows))


def _candidate(
    model: io.Plain,
    rules: RuleSetLike,
    place: Path,
    baseline: Baseline | None,
    told: Callable[[str], None],
    *,
    small: bool,
    overrides: dict[str, Any] | None = None,
    **options: Any,
) -> Candidate:
    name = str(rules)
    try:
        rule_set = load(rules, overrides={**(overrides or {}), "parity.local": "none"})
        name = rule_set.name
        told(f"{name}: rewriting")
        start = time.perf_counter()
        result = api.apply(model, rule_set, **options)
        told(f"{name}: quantizing and writing")
        saved = result.save(place)
        seconds = time.perf_counter() - start
    except RewriterError as error:
        return Candidate(name, problem=str(error))
    report = result.report
    problem, quality, output = "", None, None
    provider = Target.parse(report.target).provider
    told(f"{name}: running the result")
    try:
        if baseline is not None:
            quality = baseline.measure(saved)
        elif small and provider in available():
            outputs = result.check(runtime=OrtRuntime(provider)).outputs
            logits = logits_of(result.ir_model)
            output = outputs[logits] if logits is not None else max(outputs.values(), key=lambda m: m.relative_l2)
        else:
            problem = "not run: large without tokens" if not small else f"not run: there is no {provider} runtime here"
    except (RewriterError, ParityError) as error:
        problem = f"the result was not measured: {error}"
    for file in place.iterdir():
        file.unlink()
    mean, worst = _errors(report.weights)
    left = [weight for weight in report.left if weight.role]
    return Candidate(
        name,
        report.bytes_after,
        len(report.weights),
        mean,
        worst,
        sum(weight.nbytes for weight in left),
        sum(weight.nbytes for weight in _experts(report)),
        seconds,
        output,
        quality,
        problem,
    )


def _errors(weights: Sequence[Weight]) -> tuple[float | None, float | None]:
    sizes = [math.prod(weight.shape) for weight in weights]
    if not sum(sizes):
        return None, None
    total = sum(weight.relative_rms * size for weight, size in zip(weights, sizes, strict=True))
    return total / sum(sizes), max(weight.relative_rms for weight in weights)


def _experts(report: Report) -> Iterator[Any]:
    return (weight for weight in report.left if weight.role.startswith("expert"))
