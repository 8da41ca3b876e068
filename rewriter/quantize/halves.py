"""float16 numbers, read and written by compiled loops as float32: NumPy converts one by one, and numba not at all.

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

HALF = np.float32(0.5)


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


@compiled(inline=False)
def narrow(floats: npt.NDArray[np.float32], halves: Halves) -> None:
    """Writes the numbers of a row, rounded as NumPy rounds them: ties to even, to infinity beyond the largest."""
    row = floats.view(np.int32)
    for i in range(row.size):
        magnitude = np.int32(row[i] & np.int32(0x7FFFFFFF))
        odd = np.int32(np.int32(magnitude >> np.int32(13)) & np.int32(1))
        normal = np.int32(np.int32(magnitude - np.int32(0x38000000 - 0xFFF) + odd) >> np.int32(13))
        # Added to 1/2, a float32 has no room for less than the least bit of a half.
        small = np.int32(np.float32(magnitude.view(np.float32) + HALF).view(np.int32) - np.int32(0x3F000000))
        value = min(normal, np.int32(0x7C00)) if magnitude >= np.int32(0x38800000) else small
        value = np.int32(0x7E00) if magnitude > np.int32(0x7F800000) else value
        halves[i] = np.int16(value | np.int32(np.int32(row[i] >> np.int32(16)) & np.int32(0x8000)))
