"""Lossless: a weight that lies on a grid is written as that grid, with the same values.

Models that were trained in few bits, and widened by an exporter, lie on one: e2m1 times a power of two (mxfp4), e2m1
times an e4m3 scale (nvfp4), or integers times one scale for a block or a row. ``forms_of`` says by a sample on which a
weight may lie, so that an ordinary weight costs a few blocks; ``off_grid`` looks at all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import numpy.typing as npt

from rewriter.errors import QuantizationError
from rewriter.quantize import grids
from rewriter.quantize.formats import FORMATS, INT, MXFP4, NVFP4, Format
from rewriter.quantize.job import QuantizationJob
from rewriter.quantize.kernels import Floats
from rewriter.quantize.rows import DTYPES, over_rows
from rewriter.quantize.types import CodeArray, FloatArray, QuantizedShape, QuantizedWeight, WeightContext, WeightSpec
from rewriter.tensors import View

NAME = "lossless"
BLOCKS = (0, 256, 128, 64, 32, 16)
"""Block sizes of integers, the longest first; a weight on one lies on the shorter ones that divide it."""

_ROWS, _COLUMNS, _EXPERTS = 4, 512, 3
"""What a sample holds of a weight and of a stack."""


@dataclass(frozen=True)
class Read:
    """What was read of a weight.

    Attributes:
        weight: its codes and scales; None where it is off the grid.
        row: of the first block that is off; -1 where none is.
        block: of the first block that is off.
    """

    weight: QuantizedWeight | None
    row: int = -1
    block: int = -1


def quantize(weight: FloatArray, context: WeightContext) -> QuantizedWeight:
    """Writes an [N, K] weight as the grid that the context's spec names.

    Raises:
        QuantizationError: it does not lie on that grid.
    """
    spec = context.spec
    found = read(weight, spec, context.scale_dtype)
    if found.weight is None:
        where = f"row {found.row}, block {found.block}"
        raise QuantizationError(f"weight '{context.weight}' does not lie on a grid of {show(spec)}: {where} is off it")
    _require_same(weight, found.weight, context.weight)
    return found.weight


def _require_same(weight: FloatArray, found: QuantizedWeight, name: str) -> None:
    """Holds what was read to the weight, number by number."""

    def differs(first: int, chunk: Floats) -> bool:
        rows = slice(first, first + len(chunk))
        zeros = None if found.zero_points is None else found.zero_points[rows]
        part = replace(found, codes=found.codes[rows], scales=found.scales[rows], zero_points=zeros)
        return not np.array_equal(part.dequantize().astype(weight.dtype), weight[rows])

    if any(over_rows(weight, differs)):
        raise QuantizationError(f"weight '{name}' was read from its grid wrongly: its values are not the same")


def read(weight: FloatArray, spec: WeightSpec, scale_dtype: np.dtype[np.generic]) -> Read:
    """Reads an [N, K] weight in float32, float16 or bfloat16 as codes and scales of the spec's format."""
    own = FORMATS[spec.format]
    n, k = weight.shape
    block = spec.block_size or k
    codes = np.empty((n, k), np.uint8)
    blocks = -(-k // block)
    if own is INT:
        return _read_integers(weight, spec, scale_dtype, codes, blocks)
    if own is MXFP4:
        powers = np.empty((n, blocks), np.uint8)
        off = _first_off(weight, lambda rows, chunk: grids.read_mxfp4_rows(chunk, codes[rows], powers[rows]))
        if off is not None:
            return Read(None, *off)
        return Read(QuantizedWeight(codes, powers.view(ml_dtypes.float8_e8m0fnu), None, 4, 32, format=own.name))
    exact = np.empty((n, blocks), np.float64)
    off = _first_off(weight, lambda rows, chunk: grids.read_nvfp4_rows(chunk, codes[rows], exact[rows]))
    return Read(None, *off) if off is not None else _with_global_scale(codes, exact)


def _read_integers(
    weight: FloatArray, spec: WeightSpec, scale_dtype: np.dtype[np.generic], codes: CodeArray, blocks: int
) -> Read:
    n, k = weight.shape
    scales, zeros = np.empty((n, blocks), scale_dtype), np.empty((n, blocks), np.uint8)
    of_weight, of_scale = DTYPES[weight.dtype][:2], DTYPES[np.dtype(scale_dtype)][:2]
    top = (1 << spec.bits) - 1

    def task(rows: slice, chunk: Floats) -> tuple[int, int]:
        exact = np.zeros(scales[rows].shape, np.float32)
        block = spec.block_size or k
        off = grids.read_integer_rows(
            chunk, block, top, spec.symmetric, of_weight, of_scale, codes[rows], exact, zeros[rows]
        )
        scales[rows] = exact
        return off

    off = _first_off(weight, task)
    if off is not None:
        return Read(None, *off)
    if spec.bits == 3 and (scales.astype(np.float32) < 0).any():  # no kernel takes them
        return Read(None, int(np.argwhere(scales.astype(np.float32) < 0)[0][0]), 0)
    return Read(QuantizedWeight(codes, scales, None if spec.symmetric else zeros, spec.bits, spec.block_size))


def _with_global_scale(codes: CodeArray, exact: npt.NDArray[np.float64]) -> Read:
    """Divides nvfp4's scales by a power of two, the nearest to 1 with which all of them are numbers of e4m3."""
    largest = float(exact.max(initial=0.0))
    most = math.ceil(math.log2(largest / grids.E4M3_LARGEST)) if largest else 0
    off = (0, 0)
    for shift in range(0, most - 1, -1) if most <= 0 else (most,):
        scales = (exact / 2.0**shift).astype(ml_dtypes.float8_e4m3fn)
        wrong = np.argwhere(scales.astype(np.float64) * 2.0**shift != exact)
        if not len(wrong):
            return Read(QuantizedWeight(codes, scales, None, 4, 16, format=NVFP4.name, global_scale=2.0**shift))
        off = (int(wrong[0][0]), int(wrong[0][1]))
    return Read(None, *off)


def _first_off(weight: FloatArray, task: Callable[[slice, Floats], tuple[int, int]]) -> tuple[int, int] | None:
    """Returns row and block of the first that is off a grid, or None."""

    def run(first: int, chunk: Floats) -> tuple[int, int]:
        row, block = task(slice(first, first + len(chunk)), chunk)
        return (-1, -1) if row < 0 else (first + row, block)

    return next((off for off in over_rows(weight, run) if off[0] >= 0), None)


def kept(job: QuantizationJob, accepts: Callable[[QuantizedShape], bool]) -> QuantizationJob:
    """Returns the job that keeps the grid on which a weight lies, where its spec asks for that; else the job itself.

    Args:
        job: a weight [N, K].
        accepts: whether what reads it can hold it in a form.
    """
    if not job.context.spec.lossless:
        return job
    for spec in forms_of(job.weight):
        if accepts(job.shape_in(spec)) and not off_grid(job.weight, spec):
            return on_grid(job, spec)
    return job


def on_grid(job: QuantizationJob, spec: WeightSpec) -> QuantizationJob:
    """Returns the job that writes a weight as the grid on which it lies."""
    own = FORMATS[spec.format]
    context = replace(
        job.context,
        spec=spec,
        scale_dtype=own.scale_dtype or job.weight.dtype.numpy(),
        planned=job.context.spec,
    )
    return replace(job, context=context, quantizer=quantize)


def forms_of(view: View) -> Iterator[WeightSpec]:
    """Yields the forms on whose grid a sample of a weight [N, K], or of a stack [E, N, K], lies; the smallest first.

    Reads a few rows of a few experts, and of an ordinary weight no more than the first.
    """
    if view.dtype.numpy() not in DTYPES or view.rank not in (2, 3) or 0 in view.shape:
        return
    dtype = view.dtype.numpy()
    n, k = view.shape[-2:]
    rows = min(n, _ROWS)
    parts = [matrix.slice(0, 0, rows, max(1, n // rows)).slice(1, 0, min(k, _COLUMNS)) for matrix in _some(view)]
    sample = np.concatenate([part.numpy() for part in parts])
    if np.any(sample):
        yield from _candidates(k, dtype, sample)


def _candidates(k: int, dtype: np.dtype[np.generic], sample: FloatArray) -> list[WeightSpec]:
    found: list[tuple[float, WeightSpec]] = []

    def lies(spec: WeightSpec) -> bool:
        return read(sample, spec, dtype).weight is not None

    for own in (MXFP4, NVFP4):
        spec = WeightSpec(NAME, 4, own.block or 0, True, own.name)
        if k % spec.block_size == 0 and lies(spec):
            found.append((bits_per_weight(spec, k, dtype), spec))
    for bits in INT.widths:
        for symmetric in (True, False):
            spec = WeightSpec(NAME, bits, 16, symmetric)
            if not lies(spec):
                continue
            for block in BLOCKS:
                longer = WeightSpec(NAME, bits, block, symmetric)
                if k % (block or k) == 0 and lies(longer):
                    found.append((bits_per_weight(longer, k, dtype), longer))
    return [spec for _, spec in sorted(found, key=lambda pair: pair[0])]


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


def _some(view: View) -> list[View]:
    if view.rank == 2:
        return [view]
    experts = sorted({0, view.shape[0] // 2, view.shape[0] - 1})[:_EXPERTS]
    return [view.index(0, expert) for expert in experts]


def off_grid(view: View, spec: WeightSpec) -> str:
    """Returns where a weight [N, K], or a stack [E, N, K], is off a grid; empty where it lies on it, all of it."""
    matrices = [view] if view.rank == 2 else [view.index(0, expert) for expert in range(view.shape[0])]
    for expert, matrix in enumerate(matrices):
        found = read(np.asarray(matrix.numpy()), spec, view.dtype.numpy())
        if found.weight is None:
            of = "" if view.rank == 2 else f" of expert {expert}"
            return f"row {found.row}, block {found.block}{of}"
    return ""


def show(spec: WeightSpec) -> str:
    """Returns a form as people say it."""
    own: Format = FORMATS[spec.format]
    if own is not INT:
        return own.name
    block = f"blocks of {spec.block_size}" if spec.block_size else "one scale per output"
    return f"{spec.bits} bits, {block}, {'symmetric' if spec.symmetric else 'with zero points'}"
