"""Keeps what a budget measured in the calibration's folder, so that a second size of the same model takes seconds."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from rewriter import io
from rewriter.budget.forms import Budget
from rewriter.calibration import Calibration
from rewriter.calibration.store import KEPT, MANIFEST
from rewriter.io.beside import locations
from rewriter.io.reading import model_file
from rewriter.report.provenance import versions
from rewriter.ruleset import RuleSet, used
from rewriter.target import Target


def place(model: io.Model, rule_set: RuleSet, seen: Calibration | None, options: dict[str, Any]) -> Path | None:
    """Returns the file in which what is measured would be kept; None where it would not be.

    Its name holds a digest of the model's files, the calibration, the rule set, the target and the versions.

    Args:
        model: kept only of a path.
        rule_set: what is quantized.
        seen: the calibration.
        options: of ``apply``.
    """
    if seen is None or options.get("imatrix") is not None or not isinstance(model, str | os.PathLike):
        return None
    file = model_file(Path(model))
    files = [file, *(file.parent / name for name in sorted(locations(file) or ()))]
    digest = hashlib.blake2b(digest_size=8)
    for each in (*files, *(seen.folder / name for name in (MANIFEST, *seen.summaries))):
        with each.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "blake2b").digest())
    rules = dataclasses.asdict(dataclasses.replace(used(rule_set), name="", description="", parity={}))
    target = str(Target.parse(options.get("target") or rule_set.target))
    digest.update(json.dumps([rules, target, versions()], sort_keys=True, default=str).encode())
    return seen.folder / KEPT.replace("*", digest.hexdigest())


def read(file: Path | None) -> Budget | None:
    """Returns what was kept; None where nothing was, or what lies there is something else."""
    try:
        return None if file is None else TypeAdapter(Budget).validate_json(file.read_bytes())
    except (OSError, ValueError):
        return None


def write(file: Path | None, budget: Budget) -> None:
    """Keeps it, where the folder can be written."""
    if file is not None:
        with contextlib.suppress(OSError):
            partial = file.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(dataclasses.asdict(budget)), encoding="utf-8")
            partial.replace(file)
