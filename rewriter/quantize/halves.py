"""float16 numbers, read by compiled loops as float32: NumPy converts them one by one, and numba not at all.

The cache of compiled code does not see a change in this file: save ``kernels.py`` and ``error.py`` anew after one.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rewriter.quantize.compiling import compiled

Halves = npt.NDArray[np.int16]
"""The bits of float16 numbers."""

WIDER = np.float32(2.0**112)
"""Between the biases of the exponents of float32 and float16."""


@compiled()
def widen(halves: Halves, floats: npt.NDArray[np.float32]) -> None:
    """Writes the numbers of a row."""
    row = floats.view(np.int32)
    for i in range(row.size):
        bits = np.int32(halves[i])
        magnitude = np.int32(np.int32(bits & np.int32(0x7FFF)) << np.int32(13))
        # A product, since it makes normal numbers of subnormal ones.
        value = np.float32(magnitude.view(np.float32) * WIDER).view(np.int32)
        value = np.int32(value | (np.int32(0x7F800000) if magnitude >= np.int32(0x0F800000) else np.int32(0)))
        row[i] = np.int32(value | np.int32(np.int32(bits >> np.int32(15)) << np.int32(31)))


@compiled(inline=False)
def widen_rows(halves: Halves, floats: npt.NDArray[np.float32], column: int) -> None:
    """Writes rows [N, K] from a column of others on."""
    for n in range(halves.shape[0]):
        widen(halves[n], floats[n, column : column + halves.shape[1]])
