"""A calibration folder: what each weight saw, mapped from disk and gathered one weight at a time."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rewriter.calibration.files import read_choice, read_rows
from rewriter.calibration.identity import Part, stored_parts
from rewriter.errors import UsageError
from rewriter.quantize.importance import CALIBRATED
from rewriter.report.coverage import BlockCoverage, Coverage
from rewriter.tensors import View

MANIFEST = "calibration.json"
SAMPLE = "sample.npy"
KEPT = "budget-*.json"
"""What a budget measured by this calibration; gone with it."""

VERSION = 1

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Rows:
    """What some weights saw, as it lies on disk.

    Attributes:
        id: names its files: ``<id>.f16`` holds [rows, features] float16, each row a power of two too small;
            ``<id>.exp`` holds the exponents, [rows] int8.
        features: K.
        rows: how many there are.
        sorted: whether the rows lie by expert; else by token.
    """

    id: str
    features: int
    rows: int
    sorted: bool = False


@dataclass(frozen=True)
class Choice:
    """A router's choice: ``<id>.choice`` holds [tokens, k] uint16.

    Attributes:
        id: names the file.
        tokens: how many were routed.
        experts: E.
        k: experts per token.
        layer: index of the layer, or None.
        counts: tokens that each expert saw, [E].
    """

    id: str
    tokens: int
    experts: int
    k: int
    layer: int | None
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Seen:
    """Where the rows that one stored matrix saw are kept.

    Attributes:
        rows: id of the rows.
        choice: id of the router's choice that tells whose they are; empty where it saw all.
        expert: which expert of that router it is.
    """

    rows: str
    choice: str = ""
    expert: int = 0


@dataclass(frozen=True)
class Activations:
    """What one weight saw; equal for weights that saw the same, as gate and up do.

    Attributes:
        features: K.
        count: how many rows there are.
    """

    features: int
    count: int
    _seen: tuple[Seen, ...]
    _calibration: Calibration = field(repr=False)

    def __call__(self) -> Float32:
        """Reads the [count, K] rows, in the order of the tokens."""
        parts = [self._calibration._read(seen) for seen in self._seen]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class Calibration:
    """What the weights of one model saw; nothing is read from disk before it is asked for."""

    def __init__(
        self,
        folder: Path,
        tokens: int,
        rows: Iterable[Rows],
        choices: Iterable[Choice],
        weights: Mapping[Part, Sequence[Seen]],
        frequencies: Mapping[str, str],
        *,
        sampled: bool = False,
    ) -> None:
        self.folder = folder
        self.tokens = tokens
        self._rows = {entry.id: entry for entry in rows}
        self._choices = {entry.id: entry for entry in choices}
        self._weights = {part: tuple(seen) for part, seen in weights.items()}
        self._frequencies = dict(frequencies)
        self._sampled = sampled

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Calibration:
        """Opens a folder that ``rewriter calibrate`` wrote.

        Raises:
            UsageError: it is no such folder, or a file of it is missing or cut.
        """
        folder = Path(path)
        try:
            document = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            hint = "give a folder that rewriter calibrate wrote"
            raise UsageError(f"'{folder}' is no calibration: there is no {MANIFEST} in it; {hint}") from error
        except (OSError, ValueError) as error:
            raise UsageError(f"'{folder / MANIFEST}' cannot be read ({error}); calibrate again") from error
        try:
            found = cls._of_document(folder, document)
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"'{folder / MANIFEST}' is of another version or broken; calibrate again") from error
        found._require_files()
        return found

    @classmethod
    def _of_document(cls, folder: Path, document: Mapping[str, Any]) -> Calibration:
        if document["version"] != VERSION:
            raise ValueError(document["version"])
        weights: dict[Part, list[Seen]] = {}
        for entry in document["weights"]:
            weights.setdefault(Part(entry[0], entry[1]), []).append(Seen(*entry[2:]))
        choices = [Choice(**{**entry, "counts": tuple(entry["counts"])}) for entry in document["choices"]]
        rows = [Rows(**entry) for entry in document["rows"]]
        sampled = document.get("sampled", False)  # a folder of an earlier release has no sample
        return cls(folder, document["tokens"], rows, choices, weights, document["frequencies"], sampled=sampled)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the folder, once."""
        return _opened, (self.folder.absolute(), self.manifest.stat().st_mtime_ns)

    def document(self) -> dict[str, Any]:
        """Returns what the manifest holds."""
        return {
            "version": VERSION,
            "tokens": self.tokens,
            "rows": [vars(entry) for entry in self._rows.values()],
            "choices": [vars(entry) for entry in self._choices.values()],
            "weights": [
                [*part, seen.rows, seen.choice, seen.expert] for part, found in self._weights.items() for seen in found
            ],
            "frequencies": self._frequencies,
            "sampled": self._sampled,
        }

    @property
    def weights(self) -> tuple[Part, ...]:
        """The stored matrices of which it is known what they saw."""
        return tuple(self._weights)

    @property
    def choices(self) -> tuple[Choice, ...]:
        """The routers' choices, in the order of the model."""
        return tuple(self._choices.values())

    def coverage(self, model: str = "") -> Coverage:
        """Returns how many tokens the experts saw; ``model`` is what the result says was run."""
        blocks: dict[BlockCoverage, None] = {}
        for choice in sorted(self.choices, key=lambda c: -1 if c.layer is None else c.layer):
            seen = (seen for found in self._weights.values() for seen in found if seen.choice == choice.id)
            features = next((self._rows[entry.rows].features for entry in seen), 0)
            same = next((b for b in blocks if (b.layer, b.counts) == (choice.layer, choice.counts)), None)
            if same is None:  # projections that an index takes one by one each have a choice of their own
                blocks[BlockCoverage(choice.layer, features, choice.counts)] = None
        return Coverage(model, self.tokens, len({part.source for part in self._weights}), tuple(blocks))

    def activations(self, source: str, expert: int | None = None) -> Activations | None:
        """Returns what a stored matrix saw, as a function that reads it: [tokens, K] float32.

        Args:
            source: name of the initializer, as the model that was calibrated has it.
            expert: index of the matrix in a stack; None where the initializer is one matrix.

        Returns:
            None where it is not known; no rows where it is known that no token came by.
        """
        seen = self._weights.get(Part(source, expert)) or self._weights.get(Part(source, None))
        if seen is None:
            return None
        features = self._rows[seen[0].rows].features
        return Activations(features, sum(map(self._count, seen)), seen, self)

    def of(self, weight: View, expert: int | None = None) -> Activations | None:
        """Returns what a weight [N, K] saw, however it is made of stored matrices; None where it is not known.

        Args:
            weight: the weight.
            expert: which expert it is, where the axes of what is stored do not tell.
        """
        parts = stored_parts(weight, expert)
        found = [self.activations(*part) for part in parts]
        first = found[0] if found else None
        if first is None or first.features != weight.shape[-1] or any(other != first for other in found):
            return None
        return first

    def frequencies(self, source: str) -> npt.NDArray[np.int64] | None:
        """Returns how often each row of a table was looked up, [V]; None where it is no table that is known."""
        name = self._frequencies.get(source)
        return None if name is None else np.load(self.folder / f"{name}.npy")

    def sample(self) -> npt.NDArray[np.int64] | None:
        """Returns some of the tokens that the model was run on, [sequences, length]; None where none were kept."""
        return np.load(self.folder / SAMPLE) if self._sampled else None

    def importance(self) -> dict[str, npt.NDArray[np.float32]]:
        """Returns mean squares of what each weight saw: [K], or [E, K] of a stack, by name of the initializer."""
        with np.load(self.folder / CALIBRATED) as stored:
            return {name: stored[name] for name in stored.files}

    def _count(self, seen: Seen) -> int:
        return self._choices[seen.choice].counts[seen.expert] if seen.choice else self._rows[seen.rows].rows

    def _read(self, seen: Seen) -> Float32:
        entry = self._rows[seen.rows]
        files = self.folder / f"{entry.id}.f16", self.folder / f"{entry.id}.exp"
        return read_rows(*files, (entry.rows, entry.features), self._where(entry, seen))

    def _where(self, entry: Rows, seen: Seen) -> slice | npt.NDArray[np.intp]:
        if not seen.choice:
            return slice(None)
        choice = self._choices[seen.choice]
        if entry.sorted:
            first = sum(choice.counts[: seen.expert])
            return slice(first, first + choice.counts[seen.expert])
        return np.nonzero((self.chosen(choice) == seen.expert).any(axis=1))[0]

    def chosen(self, choice: Choice) -> npt.NDArray[np.uint16]:
        """Returns the experts that each token was sent to, [tokens, k]."""
        return read_choice(self.folder, choice.id, choice.k)

    @property
    def manifest(self) -> Path:
        """The file that says what the others hold."""
        return self.folder / MANIFEST

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files beside the manifest."""
        return (*self._sizes(), *self.summaries)

    @property
    def summaries(self) -> tuple[str, ...]:
        """Names of those files that tell one calibration from another, without the rows."""
        tables = (f"{name}.npy" for name in self._frequencies.values())
        return (CALIBRATED, *tables, *([SAMPLE] if self._sampled else []))

    def _sizes(self) -> dict[str, int]:
        wanted = {f"{entry.id}.f16": entry.rows * entry.features * 2 for entry in self._rows.values()}
        wanted |= {f"{entry.id}.exp": entry.rows for entry in self._rows.values()}
        wanted |= {f"{entry.id}.choice": entry.tokens * entry.k * 2 for entry in self._choices.values()}
        return {name: size for name, size in wanted.items() if size}

    def _require_files(self) -> None:
        sizes = self._sizes()
        for name in self.files:
            file = self.folder / name
            if not file.is_file() or file.stat().st_size != sizes.get(name, file.stat().st_size):
                raise UsageError(f"'{file}' is missing or cut; calibrate again")


@functools.lru_cache(8)
def _opened(folder: Path, _: int) -> Calibration:
    return Calibration.open(folder)
