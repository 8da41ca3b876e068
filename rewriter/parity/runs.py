"""Many runs of one model: by tokens or by files of inputs, and any of its values."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from rewriter.errors import UsageError, require_no_pipe
from rewriter.graph.contents import total_bytes
from rewriter.io import Plain
from rewriter.parity.model import runnable
from rewriter.parity.model_inputs import require_tokens, token_feeds
from rewriter.parity.runtime import Array, Feeds, OrtRuntime
from rewriter.parity.stages import Stage, stages

Progress = Callable[[int, int], None]

Alone = Callable[[Sequence[Feeds]], Sequence[Array]]
"""Computes the output of one node from its inputs by name, for several runs at once."""


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
        """Returns the inputs of one run by name."""
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
        """Returns the inputs of one run by name; raises UsageError where they cannot be read."""
        found = self._feeds[index]
        return read_feeds(found) if isinstance(found, Path) else found


Runs = TokenRuns | GivenRuns
"""Inputs of several runs; each may be asked for again."""


def read_feeds(file: Path) -> Feeds:
    """Reads the arrays of an ``.npz`` file.

    Raises:
        UsageError: the file is missing, or is no such file.
    """
    require_no_pipe(file)
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
    *,
    memory: int | None = None,
    progress: Progress | None = None,
    alone: Mapping[ir.Value, Alone] | None = None,
) -> Iterator[tuple[int, str, Array]]:
    """Runs a model on many inputs; a large model is run in parts, each part on all inputs before the next.

    Args:
        source: what was given: the file is run as it is, where it is small and nothing else is asked for.
        model: the same as a model in memory.
        runs: the inputs.
        values: what to return: outputs, or any other values of the main graph.
        runtime: what runs it.
        memory: bytes that a loaded part may take; by default ``MEMORY``.
        progress: told the runs of parts done, and how many there are in all.
        alone: outputs that are not left to the runtime where the model is run in parts, and what computes them.

    Yields:
        Index of the run, name and array of each value; of one value in the order of the runs.

    Raises:
        TargetError: the runtime cannot run the model.
    """
    for value in dict.fromkeys(values):
        if value.is_graph_input():
            yield from ((index, value.name or "", runs.feeds(index)[value.name or ""]) for index in range(len(runs)))
    wanted = [value for value in values if not value.is_graph_input()]
    most = part_bytes(memory)
    told = progress or (lambda done, total: None)
    if not wanted:
        return
    if total_bytes(model) <= most and all(value.is_graph_output() for value in wanted):
        with runnable(source, model) as whole:
            loaded = runtime.load(whole)
            for index in range(len(runs)):
                found = loaded.run(runs.feeds(index), [value.name or "" for value in wanted])
                yield from ((index, name, array) for name, array in found.items())
                told(index + 1, len(runs))
        return
    computed = {value.name or "": compute for value, compute in (alone or {}).items()}
    parts = list(stages(model, set(wanted), most, alone or {}))
    with tempfile.TemporaryDirectory() as directory:
        carried = _Carried(Path(directory))
        for number, stage in enumerate(parts):
            names = tuple(dict.fromkeys((*stage.kept, *stage.wanted)))
            if len(names) == 1 and names[0] in computed:
                for index, array in _by_many(computed[names[0]], stage, runs, carried):
                    if stage.kept:
                        carried.write(names[0], index, array)
                    yield from ((index, name, array) for name in stage.wanted)
                    told(number * len(runs) + index + 1, len(parts) * len(runs))
                carried.drop(stage.done)
                continue
            carried.tell_types(stage.model)
            with runnable(stage.model, stage.model) as whole:
                loaded = runtime.load(whole)
                for index in range(len(runs)):
                    found = loaded.run(_given(stage, runs, carried, index), [*names])
                    for name in stage.kept:
                        carried.write(name, index, found[name])
                    yield from ((index, name, found[name]) for name in stage.wanted)
                    told(number * len(runs) + index + 1, len(parts) * len(runs))
            carried.drop(stage.done)


def _given(stage: Stage, runs: Runs, carried: _Carried, index: int) -> Feeds:
    feeds = runs.feeds(index)
    own = {name: feeds[name] for name in stage.inputs if name in feeds}
    return own | {name: carried.read(name, index) for name in stage.carried}


def _by_many(compute: Alone, stage: Stage, runs: Runs, carried: _Carried) -> Iterator[tuple[int, Array]]:
    """Computes one node for several runs at once, as many as are small together."""
    held: list[Feeds] = []
    size = 0
    for index in range(len(runs)):
        held.append(_given(stage, runs, carried, index))
        size += sum(array.nbytes for array in held[-1].values())
        if size >= _TOGETHER or index + 1 == len(runs):
            yield from enumerate(compute(held), index + 1 - len(held))
            held, size = [], 0


def part_bytes(memory: int | None) -> int:
    """Returns the bytes of constants that a part may have, for a runtime that takes ``memory`` when it is loaded."""
    return (MEMORY if memory is None else memory) // _COPIES


MEMORY = 4 << 30
"""Bytes that a loaded model, or a part of one, may take."""

_COPIES = 4
"""How many times the bytes of its constants a runtime may take: the message, its own copy, and what it packs."""

_TOGETHER = 64 << 20
"""Bytes of inputs of one node that are computed together."""


class _Carried:
    """Values on their way from one part of a model to another, on disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names: dict[str, int] = {}
        self._kinds: dict[tuple[str, int], tuple[np.dtype[Any], tuple[int, ...]]] = {}

    def write(self, name: str, run: int, array: Array) -> None:
        self._names.setdefault(name, len(self._names))
        self._kinds[name, run] = (array.dtype, array.shape)
        self._file(name, run).write_bytes(np.ascontiguousarray(array).tobytes())

    def read(self, name: str, run: int) -> Array:
        dtype, shape = self._kinds[name, run]
        return np.frombuffer(self._file(name, run).read_bytes(), dtype).reshape(shape)

    def tell_types(self, model: ir.Model) -> None:
        """Gives inputs of a part the types that earlier parts made: a runtime needs to know them."""
        for value in model.graph.inputs:
            if (value.name, 0) in self._kinds:
                dtype, shape = self._kinds[value.name or "", 0]
                value.type, value.shape = ir.TensorType(ir.DataType.from_numpy(dtype)), ir.Shape([None] * len(shape))

    def drop(self, names: Sequence[str]) -> None:
        for name, run in [key for key in self._kinds if key[0] in names]:
            self._file(name, run).unlink()
            del self._kinds[name, run]

    def _file(self, name: str, run: int) -> Path:
        return self._folder / f"{self._names[name]}.{run}"
