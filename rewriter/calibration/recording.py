"""What the sites of a graph see, kept run by run; and what each expert saw, told apart when all has been seen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rewriter.calibration.experts import choose, down_inputs
from rewriter.calibration.files import Array, RowsFile, append_choice, read_choice
from rewriter.calibration.identity import Part
from rewriter.calibration.sites import ExpertSite, GatheredSite, Sites
from rewriter.calibration.store import Calibration, Choice, Rows, Seen
from rewriter.errors import TargetError
from rewriter.quantize.importance import CALIBRATED

Float32 = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

_CHUNK = 4096
"""Rows of one expert that are computed at a time."""


class Recorder:
    """Writes what sites see into a folder, and makes a calibration of it."""

    def __init__(self, folder: Path, sites: Sites) -> None:
        """Prepares.

        Args:
            folder: an empty directory.
            sites: where to look.
        """
        self._folder = folder
        self._sites = sites
        keys = [(site.x, site.turned) for site in sites.linears]
        keys += [(site.x, site.turned) for site in sites.gathered]
        keys += [(site.x, False) for site in sites.experts]
        self._inputs = {key: RowsFile(folder, f"x{index}") for index, key in enumerate(dict.fromkeys(keys))}
        self._named: dict[str, list[tuple[bool, RowsFile]]] = {}
        for (value, turned), file in self._inputs.items():
            self._named.setdefault(value.name or "", []).append((turned, file))
        self._routed: dict[str, list[tuple[int, ExpertSite]]] = {}
        for index, block in enumerate(sites.experts):
            self._routed.setdefault(block.logits.name or "", []).append((index, block))
        self._gathered: dict[str, list[Array]] = {site.ids.name or "": [] for site in sites.gathered}
        self._nd = {site.ids.name for site in sites.gathered if site.nd}
        self._lookups = [np.zeros(site.rows, np.int64) for site in sites.lookups]
        self._down: list[Rows] = []
        self._choices: list[Choice] = []
        self._weights: dict[Part, list[Seen]] = {}
        self._squares: dict[Part, tuple[Doubles, int]] = {}

    def see(self, name: str, array: Array, kept: npt.NDArray[np.bool_] | None) -> None:
        """Takes note of a value in one run; the runs of a value come in one order for all values.

        Args:
            name: of the value.
            array: what it is.
            kept: [T] the tokens that are no padding; None for all.

        Raises:
            TargetError: the value is not finite.
        """
        for turned, file in self._named.get(name, ()):
            rows = _rows(np.swapaxes(array, -1, -2) if turned else array, kept).astype(np.float32)
            if not np.isfinite(rows).all():
                raise TargetError(f"the model computes infinity or NaN at '{name}' on these inputs")
            file.append(rows)
        for index, block in self._routed.get(name, ()):
            append_choice(self._folder, f"c{index}", choose(block, _rows(array, kept)))
        if name in self._gathered:
            whole = name not in self._nd or array.shape[-1:] == (1,)
            self._gathered[name].append(array.reshape(-1) if whole else array[:0].reshape(-1))
        for index, lookup in enumerate(self._sites.lookups):
            if lookup.ids.name == name:
                ids = _rows(array[..., None], kept).reshape(-1).astype(np.int64)
                self._lookups[index] += np.bincount(ids % lookup.rows, minlength=lookup.rows)

    def finish(self) -> Calibration:
        """Tells apart what each expert saw, and computes what the down projections saw."""
        for site in self._sites.linears:
            file = self._inputs[site.x, site.turned]
            for part in site.parts:
                self._note(part, Seen(file.name), file.squares, file.rows)
        for index, block in enumerate(self._sites.experts):
            self._finish_block(f"c{index}", block)
        for index, gathered in enumerate(self._sites.gathered):
            self._finish_gathered(f"g{index}", gathered)
        rows = [Rows(file.name, file.features, file.rows) for file in self._inputs.values()]
        frequencies = {}
        for index, (lookup, counts) in enumerate(zip(self._sites.lookups, self._lookups, strict=True)):
            frequencies[lookup.source] = f"f{index}"
            np.save(self._folder / f"f{index}.npy", counts)
        np.savez(self._folder / CALIBRATED, **self._importance())  # type: ignore[arg-type]
        tokens = self._lookups[0].sum() if self._lookups else max((entry.rows for entry in rows), default=0)
        return Calibration(self._folder, int(tokens), [*rows, *self._down], self._choices, self._weights, frequencies)

    def _finish_block(self, name: str, block: ExpertSite) -> None:
        file = self._inputs[block.x, False]
        down = RowsFile(self._folder, f"{name}.down", block.fc2.shape[2])
        chosen = read_choice(self._folder, name, block.form.k)
        before, after = block.parts(block.fc1, block.fc3), block.parts(block.fc2)
        counts = []
        for expert in range(block.experts):
            mine = np.nonzero((chosen == expert).any(axis=1))[0]
            counts.append(len(mine))
            squares, behind = np.zeros(file.features), down.squares.copy()
            for first in range(0, len(mine), _CHUNK):
                x = file.read(mine[first : first + _CHUNK])
                squares += np.square(x, dtype=np.float64).sum(axis=0)
                down.append(down_inputs(block, expert, x))
            for parts, rows, total in ((before, file, squares), (after, down, down.squares - behind)):
                for part in sorted(parts[expert], key=str):
                    self._note(part, Seen(rows.name, name, expert), total, len(mine))
        self._down.append(Rows(down.name, down.features, down.rows, sorted=True))
        self._choices.append(Choice(name, len(chosen), block.experts, block.form.k, block.layer, tuple(counts)))

    def _finish_gathered(self, name: str, site: GatheredSite) -> None:
        """Tells whose the rows are that an index chose a matrix for: one for each row, several, or several rows one."""
        file = self._inputs[site.x, site.turned]
        runs = [ids.astype(np.int64) % site.experts for ids in self._gathered[site.ids.name or ""]]
        whose = [_aligned(ids, rows) for ids, rows in zip(runs, file.counts, strict=True)]
        widths = {ids.shape[1] for ids in whose if ids is not None and len(ids)}
        if len(widths) > 1 or any(ids is None for ids in whose):
            return
        k = widths.pop() if widths else 1
        chosen = np.concatenate(
            [ids.reshape(-1, k) for ids in whose if ids is not None and len(ids)] or [np.empty((0, k))]
        ).astype(np.uint16)
        append_choice(self._folder, name, chosen)
        counts = []
        for expert in range(site.experts):
            mine = np.nonzero((chosen == expert).any(axis=1))[0]
            counts.append(len(mine))
            squares = np.zeros(file.features)
            for first in range(0, len(mine), _CHUNK):
                squares += np.square(file.read(mine[first : first + _CHUNK]), dtype=np.float64).sum(axis=0)
            self._note(Part(site.source, expert), Seen(file.name, name, expert), squares, len(mine))
        self._choices.append(Choice(name, len(chosen), site.experts, k, site.layer, tuple(counts)))

    def _note(self, part: Part, seen: Seen, squares: Doubles, count: int) -> None:
        """Counts ``count`` rows whose squares add up to ``squares`` [K]."""
        self._weights.setdefault(part, []).append(seen)
        before, rows = self._squares.get(part, (np.zeros_like(squares), 0))
        self._squares[part] = (before + squares, rows + count)

    def _importance(self) -> dict[str, Float32]:
        """Mean squares [K], or [E, K] of a stack, by source; experts that saw nothing have what the others have."""
        by_source: dict[str, dict[int | None, tuple[Doubles, int]]] = {}
        for part, entry in self._squares.items():
            by_source.setdefault(part.source, {})[part.expert] = entry
        return {source: _means(entries) for source, entries in by_source.items()}


def _aligned(ids: npt.NDArray[np.int64], rows: int) -> npt.NDArray[np.int64] | None:
    """The indices [n] as [rows, k]; None where they do not fit."""
    if not rows:  # as where a loop over experts comes to one that no token chose
        return np.empty((0, 1), np.int64)
    if ids.size and ids.size % rows == 0:
        return ids.reshape(rows, -1)
    return np.repeat(ids, rows // ids.size)[:, None] if ids.size and rows % ids.size == 0 else None


def _means(entries: Mapping[int | None, tuple[Doubles, int]]) -> Float32:
    total = sum(squares for squares, _ in entries.values()) / max(sum(count for _, count in entries.values()), 1)
    if None in entries:
        return np.asarray(total, np.float32)
    means = np.tile(total, (1 + max(expert for expert in entries if expert is not None), 1))
    for expert, (squares, count) in entries.items():
        if expert is not None and count:
            means[expert] = squares / count
    return means.astype(np.float32)


def _rows(array: Array, kept: npt.NDArray[np.bool_] | None) -> Array:
    """Returns [.., K] as [n, K], without the padding where there is a row for each token."""
    rows = array.reshape(-1, array.shape[-1])
    return rows[kept] if kept is not None and kept.size == len(rows) else rows
