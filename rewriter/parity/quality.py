"""Perplexity, KL divergence and top-1 agreement of two language models on real tokens, with their intervals."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter import io
from rewriter.errors import ParityError, UsageError, nearest
from rewriter.parity.metrics import Doubles, log_softmax
from rewriter.parity.model import check_interface, read
from rewriter.parity.runs import Progress, TokenRuns, run_many
from rewriter.parity.runtime import Array, OrtRuntime
from rewriter.report.quality import Estimate, Quality

_Measured = tuple[Doubles, Doubles, Doubles, npt.NDArray[np.bool_]]
"""Of a sequence of S tokens: negative log-likelihoods [S - 1] of the next tokens by the first model and by the one that
is measured, divergences [S], and whether the most likely token is the same [S]."""

_RESAMPLED = 400
"""How often the sequences are drawn anew for an interval."""

_ROWS = 32
"""Positions whose distributions are computed at a time: a vocabulary may have 250,000 tokens."""


def compare_quality(
    before: io.Model,
    after: io.Model,
    tokens: Array,
    *,
    provider: str = "cpu",
    logits: str = "",
    memory: int | None = None,
    progress: Progress | None = None,
) -> Quality:
    """Runs two language models, one after the other, on the same tokens, each sequence from its beginning.

    Args:
        before: what is expected; a path, a model or a message.
        after: what is measured against it.
        tokens: [sequences, length] ids, at least two of each sequence.
        provider: cpu or cuda.
        logits: output with the scores [B, S, V]; by default that named so.
        memory: bytes that a loaded model may take, by default 4 GiB; a larger one is run part after part.
        progress: told the runs done and the runs in all, of both models.

    Raises:
        ParityError: the models' inputs or outputs differ.
        UsageError: the tokens are none of these models, or they have no logits for every position.
        ModelError: a model cannot be read.
        TargetError: the runtime cannot run a model.
    """
    before, after = io.held(before), io.held(after)
    with tempfile.TemporaryDirectory() as directory:
        baseline = Baseline(before, tokens, Path(directory), provider=provider, logits=logits, memory=memory)
        return baseline.measure(after, progress)


class Baseline:
    """A language model that others are measured against: its logits are computed once, and kept on disk."""

    def __init__(
        self,
        model: io.Plain,
        tokens: Array,
        directory: Path,
        *,
        provider: str = "cpu",
        logits: str = "",
        memory: int | None = None,
    ) -> None:
        """Prepares; the model is run when another is measured first.

        Arguments and errors are those of ``compare_quality``; the directory is an empty one, for the logits.
        """
        self._source, self._tokens, self._memory = model, tokens, memory
        self._model = read(model)
        self._name = _logits(self._model, logits)
        TokenRuns(self._model, tokens)  # which refuses wrong tokens, before any model is rewritten or run
        if tokens.shape[1] < 2:
            raise UsageError("a sequence of one token has no next one to predict; give at least two")
        self._runtime = OrtRuntime(provider, threads=0)
        self._file = directory / "expected"
        self._kind: tuple[tuple[int, ...], np.dtype[Any]] | None = None

    def measure(self, after: io.Plain, progress: Progress | None = None) -> Quality:
        """Runs a model on the tokens, each sequence from its beginning, and says how far it is from the first.

        ``progress`` is told the runs done and the runs in all, of both models. Errors are as of ``compare_quality``.
        """
        model = read(after)
        check_interface(self._model, model)
        told = progress or (lambda done, total: None)
        if self._kind is None:
            self._kind = self._run(self._source, self._model, lambda _, array: _append(self._file, array), told, 0)
        shape, dtype = self._kind
        found: list[_Measured] = []

        def measure(index: int, actual: Array) -> None:
            offset = index * int(np.prod(shape)) * dtype.itemsize
            expected = np.memmap(self._file, dtype, "r", offset, shape)
            found.append(_measure(expected, actual, self._tokens[index]))

        self._run(after, model, measure, told, len(self._tokens))
        return _summed_up(found, self._runtime.name)

    def _run(
        self, source: io.Plain, model: ir.Model, take: Callable[[int, Array], None], told: Progress, done: int
    ) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Hands the logits [S, V] of each sequence on; returns their shape and dtype."""
        tokens, name = self._tokens, self._name
        value = next(v for v in model.graph.outputs if v.name == name)
        runs = TokenRuns(model, tokens)
        shape: tuple[int, ...] = ()
        dtype: np.dtype[Any] = np.dtype(np.float32)
        count = len(tokens)

        def progress(now: int, total: int) -> None:
            told(done + now * count // total, 2 * count)

        for index, _, array in run_many(
            source, model, runs, [value], self._runtime, memory=self._memory, progress=progress
        ):
            shape, dtype = array.shape[-2:], array.dtype
            if array.ndim < 2 or array.size != tokens.shape[1] * array.shape[-1]:
                given = f"{list(array.shape)} for {tokens.shape[1]} tokens"
                raise UsageError(f"output '{name}' is {given}: there are no logits for every position")
            take(index, array.reshape(shape))
        return shape, dtype


def _append(file: Path, array: Array) -> None:
    with file.open("ab") as stream:
        stream.write(np.ascontiguousarray(array).tobytes())


def _logits(model: ir.Model, asked: str) -> str:
    names = [value.name or "" for value in model.graph.outputs]
    if asked:
        if asked not in names:
            raise UsageError(f"the models have no output '{asked}'{nearest(asked, names)}")
        return asked
    found = logits_of(model)
    if found is None:
        raise UsageError("no output is named logits; say which holds the scores of the tokens (--logits)")
    return found


def logits_of(model: ir.Model) -> str | None:
    """Returns the output that is named as the scores of tokens are; None where there is none."""
    names = (value.name or "" for value in model.graph.outputs)
    return next((name for name in names if name.rpartition(".")[2] == "logits"), None)


def _measure(expected: Array, actual: Array, tokens: Array) -> _Measured:
    """Measures the logits [S, V] of one sequence of tokens [S]."""
    if expected.shape != actual.shape:
        raise ParityError(f"the logits differ in shape: {list(expected.shape)} and {list(actual.shape)}")
    losses: list[_Measured] = []
    for first in range(0, len(expected), _ROWS):
        e, a = (log_softmax(part[first : first + _ROWS].astype(np.float64)) for part in (expected, actual))
        if not (np.isfinite(e.max(axis=1)).all() and np.isfinite(a.max(axis=1)).all()):
            raise ParityError("the logits of a model are not finite")
        p = np.exp(e)
        with np.errstate(invalid="ignore"):
            kl = np.where(p > 0, p * (e - a), 0.0).sum(axis=1)
        following = tokens[first + 1 : first + 1 + _ROWS].astype(np.intp)
        rows = np.arange(len(following))
        losses.append((-e[rows, following], -a[rows, following], kl, e.argmax(axis=1) == a.argmax(axis=1)))
    before, after, kl, same = (np.concatenate(parts) for parts in zip(*losses, strict=True))
    return before, after, kl, same


def _summed_up(found: list[_Measured], runtime: str) -> Quality:
    before, after, kl, same = (np.stack(rows) for rows in zip(*found, strict=True))
    draws = np.random.default_rng(0).integers(0, len(found), (_RESAMPLED, len(found)))

    def estimate(figure: Callable[[npt.NDArray[np.intp]], float]) -> Estimate:
        value = figure(np.arange(len(found)))
        if len(found) < 2:
            return Estimate(value)
        low, high = np.quantile([figure(draw) for draw in draws], (0.025, 0.975))
        return Estimate(value, float(low), float(high))

    b, a, k, s = (rows.mean(axis=1) for rows in (before, after, kl, same))
    return Quality(
        runtime=runtime,
        sequences=len(found),
        tokens=kl.size,
        perplexity_before=estimate(lambda i: float(np.exp(b[i].mean()))),
        perplexity_after=estimate(lambda i: float(np.exp(a[i].mean()))),
        perplexity_increase=estimate(lambda i: float(np.expm1((a[i] - b[i]).mean()))),
        kl=estimate(lambda i: float(k[i].mean())),
        kl_p99=estimate(lambda i: float(np.quantile(kl[i], 0.99))),
        top1=estimate(lambda i: float(s[i].mean())),
    )
