"""Feeds compiled kernels with bounded chunks of a weight's rows, in float32, on all cores."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import ml_dtypes
import numpy as np
import numpy.typing as npt

from rewriter.errors import QuantizationError
from rewriter.quantize.types import FloatArray

Rows = npt.NDArray[np.float32]
Result = TypeVar("Result")

CHUNK = 1 << 18
"""Weights in one chunk: 1 MiB of float32, which stays in a core's own cache."""

TILE = 256
"""Columns copied at a time from a weight whose rows are not contiguous; whole rows are five times slower."""

READABLE = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


def check_readable(weight: FloatArray, name: str) -> None:
    """Declines what the kernels cannot read.

    Args:
        weight: the array given to a quantizer.
        name: name of the weight in the model.

    Raises:
        QuantizationError: the weight is not a non-empty [N, K] matrix of a supported dtype.
    """
    if weight.dtype not in READABLE:
        raise QuantizationError(
            f"weight '{name}' is {weight.dtype}; only float32, float16 and bfloat16 can be quantized"
        )
    if weight.ndim != 2 or 0 in weight.shape:
        raise QuantizationError(f"weight '{name}' has shape {list(weight.shape)}; expected a non-empty [N, K] matrix")


def over_rows(weight: FloatArray, task: Callable[[int, Rows], Result]) -> list[Result]:
    """Runs ``task(first_row, chunk)`` for every chunk of rows; a weight of several chunks uses all cores.

    Args:
        weight: [N, K] in any float dtype and any strides; only read.
        task: is given the index of the chunk's first row and the chunk, [rows, K] float32, C-contiguous and
            read-only. It must release the GIL to run beside others, and must not call ``over_rows`` itself.

    Returns:
        The tasks' results, in row order.
    """
    n, k = weight.shape
    step = max(1, CHUNK // k)

    def run(first: int) -> Result:
        return task(first, _read(weight[first : first + step]))

    starts = range(0, n, step)
    if len(starts) == 1:
        return [run(0)]
    return list(_pool().map(run, starts))


def _read(rows: FloatArray) -> Rows:
    if rows.dtype == np.float32 and rows.flags.c_contiguous:
        chunk = rows.view()
    else:
        chunk = np.empty(rows.shape, np.float32)
        tile = TILE if rows.strides[1] != rows.itemsize else rows.shape[1]
        for column in range(0, rows.shape[1], tile):
            chunk[:, column : column + tile] = rows[:, column : column + tile]
    # Numba compiles once more for writable arrays.
    chunk.flags.writeable = False
    return chunk


@functools.cache
def _pool() -> ThreadPoolExecutor:
    # One pool for the process: weights that are quantized at the same time share the cores, they do not multiply them.
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="quantize")


# A forked child inherits the pool without its threads, and would wait for them forever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
