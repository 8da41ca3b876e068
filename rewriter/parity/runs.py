"""Many runs of one model: by tokens or by files of inputs, and any of its values."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx_ir as ir

from rewriter.errors import UsageError
from rewriter.io import Plain
from rewriter.parity.model import runnable
from rewriter.parity.model_inputs import require_tokens, token_feeds
from rewriter.parity.runtime import Array, Feeds, OrtRuntime

Progress = Callable[[int, int], None]


class Runs(Protocol):
    """Inputs of several runs; each may be asked for again."""

    def __len__(self) -> int:
        """How many there are."""

    def feeds(self, index: int) -> Feeds:
        """Returns the inputs of one run by name.

        Raises:
            UsageError: they cannot be read.
        """


class TokenRuns:
    """A run for each sequence of tokens; masks, positions and empty caches are as a first run has them."""

    def __init__(self, model: ir.Model, tokens: Array) -> None:
        """Prepares.

        Args:
            model: what is to be fed.
            tokens: [sequences, length] ids.

        Raises:
            UsageError: these are no tokens, or none of this model.
        """
        if tokens.ndim != 2 or tokens.dtype.kind not in "iu" or not tokens.size:
            raise UsageError(f"tokens are integers [sequences, length], not {tokens.dtype}{list(tokens.shape)}")
        self._model = model
        self.tokens = tokens
        require_tokens(model, tokens)
        self.feeds(0)

    def __len__(self) -> int:
        return len(self.tokens)

    def feeds(self, index: int) -> Feeds:
        """See :class:`Runs`."""
        return token_feeds(self._model, self.tokens[index : index + 1])


class GivenRuns:
    """Inputs that are given: arrays by name, or ``.npz`` files of them."""

    def __init__(self, feeds: Sequence[Feeds | Path]) -> None:
        """Prepares.

        Raises:
            UsageError: there are none.
        """
        if not feeds:
            raise UsageError("there are no inputs to run the model on; give an .npz file for each run")
        self._feeds = feeds

    def __len__(self) -> int:
        return len(self._feeds)

    def feeds(self, index: int) -> Feeds:
        """See :class:`Runs`."""
        found = self._feeds[index]
        return read_feeds(found) if isinstance(found, Path) else found


def read_feeds(file: Path) -> Feeds:
    """Reads the arrays of an ``.npz`` file.

    Raises:
        UsageError: the file is missing, or is no such file.
    """
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except FileNotFoundError as error:
        raise UsageError(f"there is no file '{file}'; give an .npz file with an array for each input") from error
    except Exception as error:  # what numpy raises depends on the bytes it meets
        raise UsageError(f"'{file}' is not an .npz file of plain arrays; write it with numpy.savez") from error


def run_many(
    source: Plain,
    model: ir.Model,
    runs: Runs,
    values: Sequence[ir.Value],
    runtime: OrtRuntime,
    progress: Progress | None = None,
) -> Iterator[tuple[int, str, Array]]:
    """Runs a model on many inputs.

    Args:
        source: what was given: the file is run as it is, where nothing else than its outputs is asked for.
        model: the same as a model in memory.
        runs: the inputs.
        values: what to return: outputs, or any other values of the main graph.
        runtime: what runs it.
        progress: told the runs done and the runs in all.

    Yields:
        Index of the run, name and array of each value; of one value in the order of the runs.

    Raises:
        TargetError: the runtime cannot run the model.
    """
    names = [value.name or "" for value in values if not value.is_graph_input()]
    given = [value.name or "" for value in values if value.is_graph_input()]
    inner = any(not value.is_graph_output() for value in values if not value.is_graph_input())
    with _more_outputs(model, values), runnable(model if inner else source, model) as whole:
        loaded = runtime.load(whole)
        for index in range(len(runs)):
            feeds = runs.feeds(index)
            found = loaded.run(feeds, names) if names else {}
            for name in given:
                yield index, name, feeds[name]
            yield from ((index, name, array) for name, array in found.items())
            if progress is not None:
                progress(index + 1, len(runs))


@contextlib.contextmanager
def _more_outputs(model: ir.Model, values: Sequence[ir.Value]) -> Iterator[None]:
    """Makes values outputs of the graph until the block ends."""
    outputs = model.graph.outputs
    before = list(outputs)
    outputs.extend(value for value in values if not value.is_graph_output() and not value.is_graph_input())
    try:
        yield
    finally:
        outputs[:] = before
