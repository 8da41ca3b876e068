"""Running a float model on tokens, and keeping what its weights see."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import onnx_ir as ir

from rewriter import io
from rewriter.calibration.recording import Recorder
from rewriter.calibration.sites import find_sites
from rewriter.calibration.store import MANIFEST, Calibration
from rewriter.engine.context import ModelRun
from rewriter.engine.driver import Engine
from rewriter.errors import UsageError
from rewriter.graph.contents import total_bytes
from rewriter.io.output import complete_directory
from rewriter.parity.local import LocalProver
from rewriter.parity.model_inputs import token_feeds, token_input
from rewriter.parity.runtime import Array, Feeds, Loaded, OrtRuntime
from rewriter.quantize import ALGORITHMS
from rewriter.quantize.plan import CUSTOM
from rewriter.ruleset import load
from rewriter.target import Target

_IN_MEMORY = 1 << 30

Progress = Callable[[int, int], None]


def calibrate(
    model: io.Model,
    out: str | os.PathLike[str],
    *,
    tokens: Array | None = None,
    feeds: Iterable[Feeds] | None = None,
    provider: str = "cpu",
    progress: Progress | None = None,
) -> Calibration:
    """Runs a float model and writes what each of its weights saw into a folder.

    Args:
        model: a path, an ``onnx_ir.Model`` or an ``onnx.ModelProto``.
        out: the folder; it must not exist.
        tokens: [sequences, length] token ids; masks, positions and empty caches are fed as a first run has them.
        feeds: inputs by name, for each run, in place of tokens.
        provider: cpu or cuda.
        progress: told the runs done and the runs in all.

    Returns:
        The calibration.

    Raises:
        UsageError: tokens or feeds do not fit the model, or the folder exists.
        ModelError: the model is unreadable or invalid.
        TargetError: the runtime cannot run the model.
    """
    place = io.Place.of(out)
    run = _fused(io.own_copy(model), provider)
    sites = find_sites(run)
    if not sites.values:
        raise UsageError("the model has no float weight that a calibration would help; is it quantized already?")
    runs = _runs(run.model, tokens, feeds)
    total = 0 if tokens is None else len(tokens)
    with complete_directory(place, MANIFEST) as folder:
        recorder = Recorder(folder, sites)
        names = [value.name or "" for value in sites.values if not value.is_graph_input()]
        with _runnable(run.model, sites.values, provider) as loaded:
            for done, fed in enumerate(runs, 1):
                recorder.see({**fed, **loaded.run(fed, names)}, _kept(run.model, fed))
                if progress is not None:
                    progress(done, total)
        document = recorder.finish().document()
        (folder / MANIFEST).write_text(json.dumps(document), encoding="utf-8")
    return Calibration.open(out)


def _fused(model: ir.Model, provider: str) -> ModelRun:
    """Fuses experts as far as the provider runs them; that an MoE is right is proved as always."""
    rule_set = load("fuse-experts")
    target = Target.parse("auto" if provider == "cpu" else provider)
    run = ModelRun(model, rule_set.plan, target, {CUSTOM: ALGORITHMS["rtn"], **ALGORITHMS})
    Engine(run, LocalProver(rule_set.parity.local, rule_set.parity.seed)).apply(rule_set)
    return run


def _runs(model: ir.Model, tokens: Array | None, feeds: Iterable[Feeds] | None) -> Iterator[Feeds]:
    if (tokens is None) == (feeds is None):
        raise UsageError("give either tokens or feeds")
    if feeds is not None:
        return iter(feeds)
    assert tokens is not None
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu" or not tokens.size:
        raise UsageError(f"tokens are integers [sequences, length], not {tokens.dtype}{list(tokens.shape)}")
    return (token_feeds(model, tokens[first : first + 1]) for first in range(len(tokens)))


def _kept(model: ir.Model, feeds: Feeds) -> Array | None:
    """Which of the tokens are no padding, [B * S] booleans; None where all are."""
    found = token_input(model)
    mask = next((array for name, array in feeds.items() if name.endswith("attention_mask")), None)
    if found is None or mask is None or mask.ndim != 2:
        return None
    ids = feeds[found[0].name or ""]
    kept: Array = mask[:, -ids.shape[-1] :].reshape(-1) != 0
    return None if kept.all() or kept.size != ids.size else kept


@contextlib.contextmanager
def _runnable(model: ir.Model, values: Sequence[ir.Value], provider: str) -> Iterator[Loaded]:
    """Loads the model with more outputs, which it does not keep."""
    outputs = model.graph.outputs
    before = list(outputs)
    inputs = set(model.graph.inputs)
    outputs.extend(value for value in values if value not in before and value not in inputs)
    runtime = OrtRuntime(provider, threads=0)
    try:
        if total_bytes(model) <= _IN_MEMORY:
            yield runtime.load(io.to_proto(model))
        else:
            with tempfile.TemporaryDirectory() as directory:
                yield runtime.load(io.save(model, Path(directory) / "model"))
    finally:
        outputs[:] = before
