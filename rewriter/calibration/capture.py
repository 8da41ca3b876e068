"""Running a float model on tokens, and keeping what its weights see."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter import io
from rewriter.calibration.experts import outputs
from rewriter.calibration.forms import prepare
from rewriter.calibration.recording import Recorder
from rewriter.calibration.store import KEPT, MANIFEST, SAMPLE, Calibration
from rewriter.errors import UsageError
from rewriter.io.output import complete_directory
from rewriter.parity.model_inputs import token_input
from rewriter.parity.runs import GivenRuns, Progress, Runs, TokenRuns, part_bytes, run_many
from rewriter.parity.runtime import Array, Feeds, OrtRuntime

SAMPLED = 2048
"""Tokens that are kept: a budget measures on them what errors do to the model's output."""


def calibrate(
    model: io.Model,
    out: str | os.PathLike[str],
    *,
    tokens: Array | None = None,
    feeds: Sequence[Feeds | Path] | None = None,
    provider: str = "cpu",
    overwrite: bool = False,
    memory: int | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Runs a float model and writes what each of its weights saw into a folder.

    Args:
        model: a path, an ``onnx_ir.Model`` or an ``onnx.ModelProto``.
        out: the folder.
        tokens: [sequences, length] token ids; masks, positions and empty caches are fed as a first run has them.
        feeds: inputs by name, or an ``.npz`` file of them, for each run, in place of tokens.
        provider: cpu or cuda.
        overwrite: replace a calibration that is there.
        memory: bytes that a loaded model may take, by default 4 GiB; a larger one is run part after part.
        progress: told the runs done and the runs in all.

    Returns:
        The calibration.

    Raises:
        UsageError: tokens or feeds do not fit the model, or the folder exists.
        ModelError: the model is unreadable or invalid.
        TargetError: the runtime cannot run the model.
    """
    place = io.Place.of(out, overwrite=overwrite, keep=[model] if isinstance(model, str | os.PathLike) else [])
    runtime = OrtRuntime(provider, threads=0)
    ours = io.own_copy(model)
    runs = _runs(ours, tokens, feeds)
    sites = prepare(ours, provider)
    if not sites.values:
        raise UsageError("the model has no float weight that a calibration would help; is it quantized already?")
    # A large block is computed expert by expert: a runtime would hold all of it, several times over.
    large = {
        site.y: partial(outputs, site)
        for site in sites.experts
        if site.y is not None and 2 * site.nbytes > part_bytes(memory)
    }
    with complete_directory(place, MANIFEST, lambda: _stale(Path(out))) as folder:
        recorder = Recorder(folder, sites)
        seen = run_many(ours, ours, runs, sites.values, runtime, memory=memory, progress=progress, alone=large)
        for index, name, array in seen:
            recorder.see(name, array, _kept(ours, runs.feeds(index)))
        document = recorder.finish().document()
        sample = _sample(ours, runs)
        if sample is not None:
            np.save(folder / SAMPLE, sample)
            document["sampled"] = True
        (folder / MANIFEST).write_text(json.dumps(document), encoding="utf-8")
    return Calibration.open(out)


def _stale(folder: Path) -> Iterable[str]:
    """Names of the files of a calibration that is there."""
    try:
        return (*Calibration.open(folder).files, *(file.name for file in folder.glob(KEPT)))
    except UsageError:  # there is none, or none that can be told from other files
        return ()


def _runs(model: ir.Model, tokens: Array | None, feeds: Sequence[Feeds | Path] | None) -> Runs:
    if tokens is not None and feeds is None:
        return TokenRuns(model, tokens)
    if feeds is not None and tokens is None:
        return GivenRuns(feeds)
    raise UsageError("a calibration takes either tokens or feeds")


def _sample(model: ir.Model, runs: Runs) -> npt.NDArray[np.int64] | None:
    """Whole sequences [n, S] from the runs, or the beginning of a long one; None where one is padded, or has no ids."""
    found: list[Array] = []
    for index in range(len(runs)):
        feeds = runs.feeds(index)
        value = token_input(model)
        ids = None if value is None else feeds[value[0].name or ""]
        if ids is None or ids.ndim != 2 or ids.shape[1] < 2 or _kept(model, feeds) is not None:
            continue
        if found and (ids.shape[1] != found[0].shape[1] or (1 + len(found)) * ids.size > SAMPLED):
            break
        found.append(ids[: max(SAMPLED // ids.shape[1], 1), :SAMPLED])
    return np.concatenate(found).astype(np.int64) if found else None


def _kept(model: ir.Model, feeds: Feeds) -> npt.NDArray[np.bool_] | None:
    """Which of the tokens are no padding, [B * S] booleans; None where all are."""
    found = token_input(model)
    mask = next((array for name, array in feeds.items() if name.endswith("attention_mask")), None)
    if found is None or mask is None or mask.ndim != 2:
        return None
    ids = feeds[found[0].name or ""]
    kept: npt.NDArray[np.bool_] = mask[:, -ids.shape[-1] :].reshape(-1) != 0
    return None if kept.all() or kept.size != ids.size else kept
