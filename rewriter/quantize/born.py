"""On which grid a weight lies, told by a sample, and the jobs that keep it there.

An ordinary weight costs a few blocks. One whose sample lies on a grid is read whole only as it is written, where a
block that is off the grid is an ``OffGridError``; who then runs the rules anew asks for a look at all of it first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np

from rewriter.quantize import lossless
from rewriter.quantize.formats import INT, MXFP4, NVFP4
from rewriter.quantize.job import QuantizationJob
from rewriter.quantize.rows import DTYPES
from rewriter.quantize.types import FloatArray, WeightSpec
from rewriter.tensors import View, drop_pages, weight_name

Held = TypeVar("Held")

BLOCKS = (0, 256, 128, 64, 32, 16)
"""Block sizes of integers, the longest first; a weight on one lies on the shorter ones that divide it."""

_ROWS, _COLUMNS = 4, 512
"""What the first sample holds of a weight; of a stack it holds as much of the first, the middle and the last."""

_PROBE = 64
"""Columns of the first row, read alone, of which no block is on a grid where a weight is ordinary."""

_MORE_ROWS, _MORE_COLUMNS = 32, 256
"""What the second sample holds of a weight; of a stack, a row of each expert, or of so many.

Each row is read from its own place on the disk."""

_NEARLY = 4
"""A weight is nearly on a grid where at most one of so many blocks of the sample is off it."""


@dataclass(frozen=True)
class Look:
    """What a sample of a weight says.

    Attributes:
        specs: the grids on which it lies, the fewest bits first.
        off: which block is off the grid on which nearly all of it lies; empty where it lies on one, or on none.
    """

    specs: tuple[WeightSpec, ...] = ()
    off: str = ""


@dataclass(frozen=True)
class Kept(Generic[Held]):
    """What becomes of weights that an operator holds in one form.

    Attributes:
        jobs: of each weight or stack: on their grid where ``held`` is not None, else as they were asked for.
        held: how the operator holds the grid; None where they are left to the next algorithm.
        off: which block kept them from their grid; empty where they lie on none at all, or on one.
    """

    jobs: tuple[tuple[QuantizationJob, ...], ...]
    held: Held | None = None
    off: str = ""


def keep(
    views: Sequence[View],
    jobs: Sequence[Sequence[QuantizationJob]],
    hold: Callable[[WeightSpec], Held | None],
    seen: MutableMapping[View, Look],
    *,
    whole: bool,
) -> Kept[Held]:
    """Returns the jobs that keep the grid on which weights lie, all of them on one, where their specs ask for that.

    Args:
        views: weights [N, K] or stacks [E, N, K].
        jobs: of each of these, one for each matrix.
        hold: how the operator holds them on a grid; None where it cannot, or the target does not run it.
        seen: what earlier looks saw; several rules ask about a weight.
        whole: whether all of them is looked at; else a sample, and the rest when it is written.
    """
    asked = tuple(map(tuple, jobs))
    if not all(job.context.spec.lossless for own in asked for job in own[:1]):
        return Kept(asked)
    off = ""
    common: list[WeightSpec] | None = None
    for view in views:
        found = seen[view] = seen.get(view) or look(view)
        off = off or found.off
        common = [spec for spec in found.specs if common is None or spec in common]
        if not common:
            break
    for spec in common or ():
        held = hold(spec)
        if held is None:
            continue
        wrong = next(filter(None, (off_grid(view, spec) for view in views)), "") if whole else ""
        if not wrong:
            return Kept(tuple(tuple(lossless.on_grid(job, spec) for job in own) for own in asked), held)
        off = off or wrong
    return Kept(tuple(tuple(_left(job, off) for job in own) for own in asked), None, off)


def _left(job: QuantizationJob, off: str) -> QuantizationJob:
    return replace(job, context=replace(job.context, off_grid=off)) if off else job


def look(view: View) -> Look:
    """Looks at a few rows of a weight [N, K], or of a few of a stack [E, N, K]; at more where these lie on a grid."""
    if view.dtype.numpy() not in DTYPES or view.rank not in (2, 3) or 0 in view.shape:
        return Look()
    k, dtype = view.shape[-1], view.dtype.numpy()
    sample = _first(view)
    if _is_ordinary(sample.probe(), dtype):
        return Look()
    parts = sample.read()
    array = np.concatenate(parts)
    if not np.any(array):
        return Look()
    some = np.count_nonzero(array.any(axis=-1)) / len(array)
    found: list[WeightSpec] = []
    off = ""

    def most(spec: WeightSpec) -> int:
        return int(some * array.size / ((spec.block_size or array.shape[1]) * _NEARLY))

    for forms in _forms(k):
        reads = [_read(parts, spec, dtype, most(spec)) for spec in forms[-1:]]
        if reads[0].off > most(forms[-1]):
            continue
        reads = [*(_read(parts, spec, dtype, most(spec)) for spec in forms[:-1]), *reads]
        found += [spec for spec, read in zip(forms, reads, strict=True) if read.weight is not None]
        nearly = [(spec, read) for spec, read in zip(forms, reads, strict=True) if 0 < read.off <= most(spec)]
        off = off or next((sample.place(*pair) for pair in nearly), "")
    if found and found[0].format == MXFP4.name:  # on nvfp4's grid too, of more bits, which no target has alone
        found = [spec for spec in found if spec.format != NVFP4.name]
    if found:
        more = _second(view)
        parts = more.read()
        kept = [spec for spec in found if _lies(parts, spec, dtype)]
        if not kept:
            off = more.place(found[0], _read(parts, found[0], dtype))
        found = kept
    specs = sorted(found, key=lambda spec: lossless.bits_per_weight(spec, k, dtype))
    return Look(tuple(specs), "" if specs else off)


def _forms(k: int) -> Iterator[list[WeightSpec]]:
    """Yields the specs of each format, the longest blocks first: a weight that is off the last is off them all."""
    for own in (MXFP4, NVFP4):
        if own.block is not None and k % own.block == 0:
            yield [WeightSpec(lossless.NAME, 4, own.block, True, own.name)]
    blocks = [block for block in BLOCKS if k % (block or k) == 0]
    for bits in INT.widths:
        for symmetric in (True, False):
            if blocks:
                yield [WeightSpec(lossless.NAME, bits, block, symmetric) for block in blocks]


def _is_ordinary(row: FloatArray, dtype: np.dtype[np.generic]) -> bool:
    """Whether no block of a row is on any grid: every form in blocks is one of the first of these, or nvfp4."""
    blocks = -(-row.shape[1] // 16)
    forms = [WeightSpec(lossless.NAME, 8, 16, symmetric=False)]
    if row.shape[1] % 16 == 0:
        forms.append(WeightSpec(lossless.NAME, 4, 16, True, NVFP4.name))
    # Of nvfp4 more than there are is said to be off, where no global scale comes near.
    return all(lossless.read(row, spec, dtype, blocks).off >= blocks for spec in forms)


def _lies(parts: Sequence[FloatArray], spec: WeightSpec, dtype: np.dtype[np.generic]) -> bool:
    return _read(parts, spec, dtype).weight is not None


def _read(
    parts: Sequence[FloatArray], spec: WeightSpec, dtype: np.dtype[np.generic], patience: int = 0
) -> lossless.Read:
    """Reads the parts of a sample as one, but each by itself where experts have a global scale of their own."""
    if spec.format != NVFP4.name:
        return lossless.read(np.concatenate(parts), spec, dtype, patience)
    total, row = lossless.Read(None), 0
    for part in parts:
        read = lossless.read(part, spec, dtype, patience)
        if read.weight is None and not total.off:
            total = replace(read, row=row + read.row)
        elif read.weight is None:
            total = replace(total, off=total.off + read.off)
        if total.off > patience:
            return total
        row += len(part)
    return total if total.off else read


@dataclass(frozen=True)
class _Sample:
    """Rows [R, C] of a weight.

    Attributes:
        view: the weight.
        parts: expert (None for a matrix), first row, rows apart, how many, first column.
        columns: how many.
    """

    view: View
    parts: tuple[tuple[int | None, int, int, int, int], ...]
    columns: int

    def read(self) -> list[FloatArray]:
        return [self._part(*part, self.columns) for part in self.parts]

    def probe(self) -> FloatArray:
        """Reads the beginning of the first row, which is enough of an ordinary weight."""
        expert, first, *_, column = self.parts[0]
        return self._part(expert, first, 1, 1, column, min(_PROBE, self.columns))

    def _part(self, expert: int | None, first: int, step: int, count: int, column: int, columns: int) -> FloatArray:
        matrix = self.view if expert is None else self.view.index(0, expert)
        part = matrix.slice(0, first, count, step).slice(1, column, columns)
        numbers = part.numpy().copy()  # else it would keep all that was read to show it
        drop_pages(part)
        return numbers

    def place(self, spec: WeightSpec, read: lossless.Read) -> str:
        """Says which block of the weight is the one that was read to be off."""
        row = read.row
        for expert, first, step, count, column in self.parts:
            if row < count:
                at = read.block + (column // spec.block_size if spec.block_size else 0)
                return lossless.place(spec, self.view.shape[-1], weight_name(self.view), first + row * step, at, expert)
            row -= count
        raise AssertionError("the row is none of the sample")


def _first(view: View) -> _Sample:
    n, k = view.shape[-2:]
    rows = min(n, _ROWS)
    last = view.shape[0] - 1
    experts = sorted({0, (last + 1) // 2, last}) if view.rank == 3 else [None]
    return _Sample(view, tuple((expert, 0, max(1, n // rows), rows, 0) for expert in experts), min(k, _COLUMNS))


def _second(view: View) -> _Sample:
    n, k = view.shape[-2:]
    columns = min(k, _MORE_COLUMNS)
    if view.rank == 2:
        rows = min(n, _MORE_ROWS)
        return _Sample(view, ((None, n // rows - 1, n // rows, rows, (k - columns) // 256 * 256),), columns)
    starts = range(0, max(1, k - columns + 1), 256)
    experts = range(0, view.shape[0], -(-view.shape[0] // _MORE_ROWS))
    parts = ((expert, 7 * expert % n, 1, 1, starts[i % len(starts)]) for i, expert in enumerate(experts))
    return _Sample(view, tuple(parts), columns)


def off_grid(view: View, spec: WeightSpec) -> str:
    """Returns which block of a weight [N, K], or a stack [E, N, K], is off a grid; empty where all of it lies on it."""
    matrices = [view] if view.rank == 2 else [view.index(0, expert) for expert in range(view.shape[0])]
    for expert, matrix in enumerate(matrices):
        read = lossless.read(np.asarray(matrix.numpy()), spec, view.dtype.numpy())
        if read.weight is None:
            of = None if view.rank == 2 else expert
            return lossless.place(spec, view.shape[-1], weight_name(view), read.row, read.block, of)
        drop_pages(matrix)
    return ""
