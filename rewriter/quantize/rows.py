"""Feeds compiled kernels with bounded chunks of a weight's rows: float32, or halves as they are stored."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import ml_dtypes
import numpy as np
import numpy.typing as npt

from rewriter.errors import QuantizationError
from rewriter.process import processors
from rewriter.quantize import kernels
from rewriter.quantize.formats import INT
from rewriter.quantize.halves import Halves, narrow, widen_rows
from rewriter.quantize.kernels import Codes, Floats
from rewriter.quantize.lanes import LANES
from rewriter.quantize.steps import steps
from rewriter.quantize.types import FloatArray, QuantizedWeight, WeightContext

Result = TypeVar("Result")
Array = TypeVar("Array", bound=npt.NDArray[Any])

CHUNK = 1 << 18
"""Weights in one chunk: 1 MiB of float32, which stays in a core's own cache."""

SHARED = 1 << 22
"""Weights from which on all cores work on one chunk each: of fewer, whoever asks is sooner done alone."""

TILE = 256
"""Columns copied at a time from a weight whose rows are not contiguous; whole rows are five times slower."""

DTYPES = {
    np.dtype(np.float32): (24, -149, 3.4028234663852886e38),
    np.dtype(np.float16): (11, -24, 65504.0),
    np.dtype(ml_dtypes.bfloat16): (8, -133, 3.3895313892515355e38),
}
"""What weights and scales may be: significant bits, exponent of the least bit, largest number."""


def over_rows(weight: FloatArray, task: Callable[[int, Floats], Result], rows: int | None = None) -> list[Result]:
    """Runs ``task(first_row, chunk)`` for every chunk of rows; a weight of ``SHARED`` or more uses all cores.

    Args:
        weight: [N, K] in any float dtype and any strides; only read.
        task: is given the index of the chunk's first row and the chunk, [rows, K] float32, C-contiguous and
            read-only. It should release the GIL.
        rows: rows of a chunk; by default as many as hold ``CHUNK`` weights.

    Returns:
        The tasks' results, in row order.
    """
    step = rows or max(1, CHUNK // max(weight.shape[1], 1))
    return _over(weight, lambda first, part: task(first, floats(part)), step)


def over_stored_rows(
    weight: FloatArray, task: Callable[[int, Floats | Halves], Result], rows: int | None = None
) -> list[Result]:
    """As ``over_rows``, but halves that follow one another in memory are given as their bits, with nothing copied.

    Args:
        weight: [N, K] in any float dtype and any strides; only read.
        task: is given the index of the chunk's first row, and the chunk: float32, or int16, the bits of float16.
        rows: rows of a chunk, at least.
    """
    step = max(rows or 1, CHUNK // max(weight.shape[1], 1))
    if weight.dtype != np.float16 or not weight.flags.c_contiguous:
        return _over(weight, lambda first, part: task(first, floats(part)), step)
    step = step if weight.size >= SHARED else max(1, len(weight))
    return _over(weight, lambda first, part: task(first, _bits(part)), step)


def _over(weight: FloatArray, task: Callable[[int, FloatArray], Result], step: int) -> list[Result]:
    def run(first: int) -> Result:
        return task(first, weight[first : first + step])

    starts = range(0, len(weight), step)
    return [run(first) for first in starts] if weight.size < SHARED else list(_each(run, starts))


def shared_out(task: Callable[[int], Result], items: Sequence[int]) -> Iterator[Result]:
    """Yields ``task(item)`` for each item in order; as many are computed at a time as there are cores."""
    at_a_time = processors()
    for first in range(0, len(items), at_a_time):
        yield from _each(task, items[first : first + at_a_time])


def _each(task: Callable[[int], Result], items: Sequence[int]) -> Iterator[Result]:
    """Runs a task for each item on all cores; within such a task on the core that it has, or all might wait for one."""
    alone = len(items) <= 1 or getattr(_THREAD, "is_ours", False)
    return map(task, items) if alone else _pool().map(task, items)


def quantize_rows(method: int, weight: FloatArray, context: WeightContext) -> QuantizedWeight:
    """Quantizes a weight by one of the methods of ``kernels``.

    Args:
        method: ``kernels.RTN``, ``K_QUANT`` or ``MSE_SEARCH``.
        weight: [N, K] float32, float16 or bfloat16 in any strides; only read.
        context: the weight's specification, scale dtype, importance and name.

    Raises:
        QuantizationError: the weight, or a scale in its dtype, is not finite; or the input is none the kernels read.
    """
    spec = context.spec
    importance = checked_importance(weight, context)
    codes, scales, zeros = empty(weight, context)

    def task(first: int, chunk: Floats | Halves) -> int:
        rows = slice(first, first + len(chunk))
        exact = np.empty(scales[rows].shape, np.float32)
        grid = (spec.block_size or weight.shape[1], (1 << spec.bits) - 1, spec.symmetric, DTYPES[context.scale_dtype])
        end = quantize_chunk(method, chunk, importance, *grid, codes[rows], exact, zeros[rows])
        if end == kernels.DONE:
            put(exact, scales[rows])
        return end

    # A tile is full of blocks, also of rows that are one block.
    ends = over_stored_rows(weight, task, -(-LANES // scales.shape[1]))
    if kernels.NOT_FINITE in ends:
        raise QuantizationError(
            f"weight '{context.weight}' holds NaN or infinity; it cannot be quantized "
            "(quantization.exclude leaves it as it is)"
        )
    if kernels.SCALE_OVERFLOW in ends:
        raise QuantizationError(f"weight '{context.weight}' needs a scale that {context.scale_dtype} cannot hold")
    return QuantizedWeight(codes, scales, None if spec.symmetric else zeros, spec.bits, spec.block_size)


def quantize_chunk(
    method: int,
    rows: Floats | Halves,
    importance: Floats | None,
    block: int,
    top: int,
    symmetric: bool,
    dtype: tuple[int, int, float],
    codes: Codes,
    scales: Floats,
    zeros: Codes,
) -> int:
    """Quantizes rows [R, K] by one of the methods of ``kernels``.

    Args:
        method: ``kernels.RTN``, ``K_QUANT`` or ``MSE_SEARCH``.
        rows: [R, K] float32, or the bits of float16; C-contiguous and read-only.
        importance: [K] weights of the squared error; None is 1 for each.
        block: weights that share a scale; a last block may be shorter.
        top: the largest code, 2^bits - 1.
        symmetric: whether every zero point is 2^(bits-1).
        dtype: of stored scales, as in ``DTYPES``.
        codes: [R, K], written.
        scales: [R, B], written.
        zeros: [R, B], written.

    Returns:
        ``kernels.DONE``, ``NOT_FINITE`` or ``SCALE_OVERFLOW``.
    """
    k, block = rows.shape[1], min(block, rows.shape[1])
    around, lengths = _in_a_row(k, block)
    weighing = None if importance is None or method == kernels.RTN else _blocks(importance[None], block)[around]
    blocks = _blocks(rows, block)
    whole = blocks.size == rows.size
    made = (
        [a.reshape(len(blocks), -1) for a in (codes, scales, zeros)]
        if whole
        else [np.empty((len(blocks), n), a.dtype) for a, n in ((codes, blocks.shape[1]), (scales, 1), (zeros, 1))]
    )
    tried = steps(method, top, symmetric)
    given = (*floats_or_halves(blocks), weighing, lengths)
    end = kernels.quantize(*given, method, top, symmetric, dtype, tried, *made)
    if not whole:
        codes[:] = made[0][: scales.size, :block].reshape(len(rows), -1)[:, :k]
        scales[:], zeros[:] = (a[: scales.size].reshape(scales.shape) for a in made[1:])
    return int(end)


@functools.lru_cache(256)
def _in_a_row(k: int, block: int) -> tuple[npt.NDArray[np.intp], Floats]:
    """Returns the blocks of a row over and over, LANES more than there are, by number and by how long they are."""
    blocks = -(-k // block)
    around = np.arange(blocks + LANES) % blocks
    return around, np.minimum(block, k - block * around).astype(np.float32)


def floats_or_halves(rows: Floats | Halves) -> tuple[Floats, Halves]:
    """Returns rows as compiled loops take them, which are compiled once for both: one of the two is of no rows."""
    is_float = rows.dtype == np.float32
    return cast("tuple[Floats, Halves]", (rows, _NO_HALVES) if is_float else (_NO_FLOATS, rows))


def _blocks(rows: npt.NDArray[Any], block: int) -> npt.NDArray[Any]:
    """Returns the blocks of rows [R, K] as the kernels take them: at least LANES, each filled up with zeros."""
    if rows.shape[1] % block or block % kernels.FILLED or rows.size < block * LANES:
        rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % block))).reshape(-1, block)
        rows = np.pad(rows, ((0, max(0, LANES - len(rows))), (0, -block % kernels.FILLED)))
        block = rows.shape[1]
    return frozen(rows.reshape(-1, block))


def empty(weight: FloatArray, context: WeightContext) -> tuple[Codes, FloatArray, Codes]:
    """Returns room for the codes [N, K], scales [N, B] and zero points [N, B] of a weight."""
    n, k = weight.shape
    blocks = -(-k // (context.spec.block_size or k))
    return np.empty((n, k), np.uint8), np.empty((n, blocks), context.scale_dtype), np.empty((n, blocks), np.uint8)


def checked_importance(weight: FloatArray, context: WeightContext) -> Floats | None:
    """Returns [K] weights of the squared error, of which only ratios matter; None where all weigh the same.

    Raises:
        QuantizationError: the weight, its spec or its importance is none that the kernels read.
    """

    def wrong(what: str) -> QuantizationError:
        return QuantizationError(f"weight '{context.weight}' cannot be quantized: {what}")

    for what, dtype in (("it", weight.dtype), ("its scale", context.scale_dtype)):
        if dtype not in DTYPES:
            raise wrong(f"{what} is {dtype}; expected float32, float16 or bfloat16")
    if weight.ndim != 2 or 0 in weight.shape:
        raise wrong(f"its shape is {list(weight.shape)}; expected a non-empty [N, K]")
    if context.spec.bits not in INT.widths or context.spec.block_size < 0:
        raise wrong(f"bits {context.spec.bits}, block size {context.spec.block_size}; expected 2, 3, 4 or 8 bits, >= 0")
    if context.importance is None:
        return None
    importance = np.asarray(context.importance, np.float64)
    if importance.shape != weight.shape[1:]:
        raise wrong(f"its importance has shape {list(importance.shape)}; expected [{weight.shape[1]}]")
    if not (np.isfinite(importance).all() and (importance >= 0).all()):
        raise wrong("its importance holds a value that is negative, NaN or infinite")
    # Only ratios matter, and the kernels' float32 sums would overflow.
    largest = max(float(importance.max()), float(np.finfo(np.float64).tiny))
    return np.asarray(importance / largest, np.float32)


def floats(rows: FloatArray) -> Floats:
    """Returns rows [N, K] in float32, C-contiguous and read-only."""
    if rows.dtype == np.float32 and rows.flags.c_contiguous:
        return frozen(rows.view())
    chunk = np.empty(rows.shape, np.float32)
    if rows.dtype == np.float16 and rows.flags.c_contiguous:
        widen_rows(_bits(rows).reshape(1, -1), chunk.reshape(1, -1), 0)
    else:
        tile = TILE if rows.strides[1] != rows.itemsize else rows.shape[1]
        for column in range(0, rows.shape[1], tile):
            part = rows[:, column : column + tile]
            if rows.dtype == np.float16:
                widen_rows(_bits(np.ascontiguousarray(part)), chunk, column)
            else:
                chunk[:, column : column + tile] = part
    return frozen(chunk)


def put(numbers: Floats, into: FloatArray) -> None:
    """Writes float32 numbers, C-contiguous, into an array of the same shape and of any float dtype."""
    if into.dtype != np.float16:
        into[...] = numbers
        return
    halves = into if into.flags.c_contiguous else np.empty(into.shape, np.float16)
    narrow(numbers.reshape(-1), halves.reshape(-1).view(np.int16))
    if halves is not into:
        into[...] = halves


def _bits(halves: FloatArray) -> Halves:
    return frozen(halves.view(np.int16))


def frozen(array: Array) -> Array:
    """Forbids to write; numba would compile once more for writable arrays."""
    array.flags.writeable = False
    return array


@functools.cache
def _pool() -> ThreadPoolExecutor:
    # One pool for the process: weights that are quantized at the same time share the cores.
    def begin() -> None:
        _THREAD.is_ours = True

    return ThreadPoolExecutor(processors(), thread_name_prefix="quantize", initializer=begin)


_THREAD = threading.local()

_NO_FLOATS, _NO_HALVES = frozen(np.empty((0, 1), np.float32)), frozen(np.empty((0, 1), np.int16))


if hasattr(os, "register_at_fork"):
    # A forked child inherits the pool without its threads, and would wait for them forever.
    os.register_at_fork(after_in_child=_pool.cache_clear)
