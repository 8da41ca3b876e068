"""Lossless: a weight that lies on a grid is written as that grid, with the same values.

Models that were trained in few bits, and widened by an exporter, lie on one: e2m1 times a power of two (mxfp4), e2m1
times an e4m3 scale and a global one (nvfp4), or integers times one scale for a block or a row. ``born`` says on which.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from rewriter.errors import QuantizationError
from rewriter.quantize import grids
from rewriter.quantize.error import relative_rms
from rewriter.quantize.formats import FORMATS, INT, MXFP4, NVFP4, Format
from rewriter.quantize.job import QuantizationJob
from rewriter.quantize.kernels import Floats
from rewriter.quantize.rows import DTYPES, over_rows
from rewriter.quantize.types import CodeArray, FloatArray, QuantizedWeight, WeightContext, WeightSpec

NAME = "lossless"

_MANTISSAS = [level * digits for level in (6, 4) for digits in range(8, 16)]
"""What the largest number of a block may be times the global scale, but for a power of two."""

_PATIENCE = 16
"""Blocks of nvfp4 that may be off before another global scale is tried: the one with the fewest says which they are."""

_BFLOAT16 = 16
"""Bits that bfloat16 has fewer than float32, and of the same numbers otherwise."""

_PROBE = 64
"""Columns of a row from which a global scale is guessed."""


class OffGridError(QuantizationError):
    """A weight of which a sample lay on a grid does not lie on it."""


@dataclass(frozen=True)
class Read:
    """What was read of a weight.

    Attributes:
        weight: its codes and scales; None where it is off the grid.
        off: how many blocks are off, as far as was looked.
        row: of the first block that is off; -1 where none is.
        block: of the first block that is off.
    """

    weight: QuantizedWeight | None
    off: int = 0
    row: int = -1
    block: int = -1


def quantize(weight: FloatArray, context: WeightContext) -> QuantizedWeight:
    """Writes an [N, K] weight as the grid that the context's spec names.

    Raises:
        OffGridError: it does not lie on that grid.
    """
    spec = context.spec
    found = read(weight, spec, context.scale_dtype)
    if found.weight is None:
        where = place(spec, weight.shape[1], context.weight, found.row, found.block)
        raise OffGridError(
            f"{where}, which shows only now that all of it is read: save it by the result's own save, which then looks"
            " at all of it first and leaves it to the plan's next algorithm"
        )
    most = 0.0 if spec.format == MXFP4.name else 2.0 ** -DTYPES[rounded_to(weight)][0]
    if relative_rms(weight, found.weight) > most:
        raise QuantizationError(
            f"weight '{context.weight}' was read from its grid wrongly: its values are not the same"
        )
    return found.weight


def place(spec: WeightSpec, k: int, name: str, row: int, block: int, expert: int | None = None) -> str:
    """Says which block of a weight is off a grid; rows are output features, columns input features.

    Args:
        spec: the grid.
        k: input features.
        name: of the weight.
        row: of the block.
        block: its index in its row.
        expert: of a stack, or None.
    """
    size = spec.block_size or k
    columns = f"columns {block * size} to {min((block + 1) * size, k) - 1}"
    of = "" if expert is None else f"expert {expert}, "
    return f"block ({of}row {row}, {columns}) of '{name}' is off the grid of {show(spec)}"


def _different(weight: FloatArray, found: QuantizedWeight) -> grids.Off:
    """Returns how many numbers are not those of the weight, and row and block of the first."""
    dtype = rounded_to(weight)

    def compare(rows: slice, chunk: Floats) -> grids.Off:
        zeros = None if found.zero_points is None else found.zero_points[rows]
        part = replace(found, codes=found.codes[rows], scales=found.scales[rows], zero_points=zeros)
        wrong = np.argwhere(part.dequantize().astype(dtype).astype(np.float32) != chunk)
        return len(wrong), *(wrong[0] // (1, found.block_size or chunk.shape[1]) if len(wrong) else (-1, -1))

    return _off(weight, compare)


def read(weight: FloatArray, spec: WeightSpec, scale_dtype: np.dtype[np.generic], patience: int = 0) -> Read:
    """Reads an [N, K] weight in float32, float16 or bfloat16 as codes and scales of the spec's format.

    Args:
        weight: the numbers.
        spec: the grid.
        scale_dtype: of the scales of integers.
        patience: how many blocks may be off the grid before the rest is not looked at.
    """
    own = FORMATS[spec.format]
    n, k = weight.shape
    codes = np.empty((n, k), np.uint8)
    blocks = -(-k // (spec.block_size or k))
    if own is INT:
        return _read_integers(weight, spec, scale_dtype, codes, blocks, patience)
    if own is NVFP4:
        return _read_nvfp4(weight, codes, patience)
    powers = np.empty((n, blocks), np.uint8)
    digits, unit, reach = DTYPES[np.dtype(np.float32)][:2], np.float64(1), np.ones(2)
    off = _off(
        weight,
        lambda rows, chunk: grids.read_float_rows(chunk, 32, unit, digits, patience, codes[rows], powers[rows], reach),
    )
    if off[0]:
        return Read(None, *off)
    return Read(QuantizedWeight(codes, powers.view(ml_dtypes.float8_e8m0fnu), None, 4, 32, format=own.name))


def _read_integers(
    weight: FloatArray,
    spec: WeightSpec,
    scale_dtype: np.dtype[np.generic],
    codes: CodeArray,
    blocks: int,
    patience: int,
) -> Read:
    n, k = weight.shape
    scales, zeros = np.empty((n, blocks), scale_dtype), np.empty((n, blocks), np.uint8)
    of_weight, of_scale = DTYPES[rounded_to(weight)][:2], DTYPES[np.dtype(scale_dtype)][:2]
    top = (1 << spec.bits) - 1

    def task(rows: slice, chunk: Floats) -> grids.Off:
        exact = np.zeros(scales[rows].shape, np.float32)
        block = spec.block_size or k
        off = grids.read_integer_rows(
            chunk, block, top, spec.symmetric, of_weight, of_scale, patience, codes[rows], exact, zeros[rows]
        )
        scales[rows] = exact
        return off

    off = _off(weight, task)
    if off[0]:
        return Read(None, *off)
    if spec.bits == 3 and (scales.astype(np.float32) < 0).any():  # no kernel takes them
        row, block = np.argwhere(scales.astype(np.float32) < 0)[0]
        return Read(None, 1, int(row), int(block))
    return Read(QuantizedWeight(codes, scales, None if spec.symmetric else zeros, spec.bits, spec.block_size))


def _read_nvfp4(weight: FloatArray, codes: CodeArray, patience: int) -> Read:
    """The global scale is guessed from a few blocks, then narrowed to what every number is rounded from."""
    n, k = weight.shape
    scales = np.empty((n, k // 16), np.uint8)
    digits = DTYPES[rounded_to(weight)][:2]
    patience = max(patience, _PATIENCE)
    found = Read(None, patience + 1, 0, 0)
    for unit, *reach in _units(weight):
        reaches: list[grids.Reach] = []

        def task(
            rows: slice,
            chunk: Floats,
            unit: float = unit,
            reach: Sequence[float] = reach,
            reaches: list[grids.Reach] = reaches,
        ) -> grids.Off:
            reaches.append(np.array(reach))
            return grids.read_float_rows(
                chunk, 16, np.float64(unit), digits, patience, codes[rows], scales[rows], reaches[-1]
            )

        off = _off(weight, task)
        if off[0]:
            found = min(found, Read(None, *off), key=lambda read: read.off)
            continue
        low, high = max(reach[0] for reach in reaches), min(reach[1] for reach in reaches)
        for global_scale in _within(low, high, unit):
            made = QuantizedWeight(
                codes, scales.view(ml_dtypes.float8_e4m3fn), None, 4, 16, format=NVFP4.name, global_scale=global_scale
            )
            off = _different(weight, made)
            if not off[0]:
                return Read(made)
            found = min(found, Read(None, *off), key=lambda read: read.off)
    return found


def _units(weight: FloatArray) -> Iterator[tuple[float, float, float]]:
    """Yields what the global scale may be near to, with bounds: powers of two, and then others.

    Of those a power of two apart, the first leaves the largest scale in the upper half of what e4m3 has, as whoever
    rounds to nvfp4 does; float values do not tell which it was.
    """
    most = max(over_rows(weight, lambda _, chunk: float(np.abs(chunk).max(initial=0.0))))
    row = next((row for row in weight if np.any(row[:_PROBE])), None)
    if row is None or not 0 < most < math.inf:
        yield 1.0, 1.0, 1.0
        return
    probe = np.array(row[None, :_PROBE], np.float32)
    probe.flags.writeable = False
    room, digits = np.empty(probe.shape, np.uint8), DTYPES[rounded_to(weight)][:2]
    units, largest = [], float(np.abs(probe).max())
    usual = most / (6 * grids.E4M3_LARGEST)
    for guess in (usual, *(largest / mantissa for mantissa in _MANTISSAS)):
        unit = guess * 2.0 ** math.ceil(math.log2(usual / guess) - grids.NEAR)
        reach = np.array([0, np.inf])
        off, _, _ = grids.read_float_rows(probe, 16, np.float64(unit), digits, 1, room, room[:, : _PROBE // 16], reach)
        if off <= 1:
            units += [unit, 2 * unit]
    powers = {2.0 ** round(math.log2(unit)) for unit in units}
    yield from ((power, power, power) for power in sorted(powers))
    yield from ((unit, 0.0, math.inf) for unit in units)


def rounded_to(weight: FloatArray) -> np.dtype[np.generic]:
    """Returns the shortest dtype that has every number: one may have been rounded to bfloat16, and then widened."""
    for dtype in (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)):

        def holds(_: int, chunk: Floats, dtype: np.dtype[np.generic] = dtype) -> bool:
            lost = 24 - DTYPES[dtype][0]
            if np.any(chunk.view(np.uint32) & np.uint32((1 << lost) - 1)):
                return False
            with np.errstate(over="ignore"):
                return lost == _BFLOAT16 or np.array_equal(chunk.astype(dtype).astype(np.float32), chunk)

        if weight.dtype == dtype or all(over_rows(weight, holds)):
            return dtype
    return weight.dtype


def _within(low: float, high: float, guess: float) -> Iterator[float]:
    """Yields float32 numbers between two: a power of two, a guess, then the middle and its neighbours."""
    if not 0 < low <= high < math.inf:
        yield 1.0  # of nothing but zeros
        return
    power = 2.0 ** math.floor(math.log2(high))
    if power >= low:
        yield power
    if low <= np.float32(guess) <= high:
        yield float(np.float32(guess))
    middle = np.float32((low + high) / 2)
    up = down = middle
    yield float(middle)
    for _ in range(2):
        up, down = np.nextafter(up, np.float32(np.inf)), np.nextafter(down, np.float32(0))
        yield from (float(up), float(down))


def _off(weight: FloatArray, task: Callable[[slice, Floats], grids.Off]) -> grids.Off:
    """Returns how many blocks are off a grid, and row and block of the first."""

    def run(first: int, chunk: Floats) -> grids.Off:
        off, row, block = task(slice(first, first + len(chunk)), chunk)
        return off, first + row, block

    found = [off for off in over_rows(weight, run) if off[0]]
    return (sum(off for off, _, _ in found), *found[0][1:]) if found else (0, -1, -1)


def on_grid(job: QuantizationJob, spec: WeightSpec) -> QuantizationJob:
    """Returns the job that writes a weight as the grid on which it lies."""
    own = FORMATS[spec.format]
    scale_dtype = own.scale_dtype or job.weight.dtype.numpy()
    return replace(job, context=replace(job.context, spec=spec, scale_dtype=scale_dtype), quantizer=quantize)


def bits_per_weight(spec: WeightSpec, k: int, dtype: np.dtype[np.generic]) -> float:
    """Returns the bits of a code with its share of scale and zero point.

    Args:
        spec: the form.
        k: input features.
        dtype: of the scales, where the format says none.
    """
    own = FORMATS[spec.format]
    scale = 8 * (own.scale_dtype or dtype).itemsize
    return spec.bits + (scale + (0 if spec.symmetric else spec.bits)) / (spec.block_size or k)


def show(spec: WeightSpec) -> str:
    """Returns a form as people say it."""
    own: Format = FORMATS[spec.format]
    if own is not INT:
        return own.name
    block = f"blocks of {spec.block_size}" if spec.block_size else "one scale per output"
    return f"{spec.bits} bits, {block}, {'symmetric' if spec.symmetric else 'with zero points'}"
