"""The files of a calibration folder: rows are appended as they are seen, in float16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]

SAFE_EXPONENT = 14
"""A row whose largest magnitude is below 2^14 is stored as it is; float16 ends below 2^16."""


class RowsFile:
    """Rows of one width, appended to two files: float16 values and, for each row, the power of two they lack."""

    def __init__(self, folder: Path, name: str, features: int = 0) -> None:
        """Prepares two files of no rows.

        Args:
            folder: where they go.
            name: their name without its ending.
            features: K, where there may be no rows to tell.
        """
        self.name = name
        self.features = features
        self.rows = 0
        self.squares = np.zeros(features)
        self.counts: list[int] = []
        self._values = folder / f"{name}.f16"
        self._exponents = folder / f"{name}.exp"

    def append(self, rows: Float32) -> None:
        """Writes finite [n, K] rows behind those that are there."""
        if not self.features:
            self.features = rows.shape[1]
            self.squares = np.zeros(self.features)
        self.rows += len(rows)
        self.counts.append(len(rows))
        self.squares += np.square(rows, dtype=np.float64).sum(axis=0)
        largest = np.abs(rows).max(axis=1, initial=0)
        exponents = np.maximum(np.frexp(largest)[1] - SAFE_EXPONENT, 0).astype(np.int8)
        if exponents.any():
            rows = np.ldexp(rows, -exponents[:, None].astype(np.int32))
        _append(self._values, rows.astype(np.float16))
        _append(self._exponents, exponents)

    def read(self, where: npt.NDArray[np.intp]) -> Float32:
        """Returns some of the rows, [n, K]."""
        return read_rows(self._values, self._exponents, (self.rows, self.features), where)


def read_rows(values: Path, exponents: Path, shape: tuple[int, int], where: slice | npt.NDArray[np.intp]) -> Float32:
    """Returns rows of two files as ``RowsFile`` writes them; others stay on disk."""
    if not shape[0]:
        return np.empty((0, shape[1]), np.float32)
    halves = np.memmap(values, np.float16, "r", shape=shape)[where].astype(np.float32)
    lacking = np.memmap(exponents, np.int8, "r", shape=shape[:1])[where].astype(np.int32)
    return np.ldexp(halves, lacking[:, None]) if lacking.any() else halves


def append_choice(folder: Path, name: str, chosen: npt.NDArray[np.uint16]) -> None:
    """Writes [n, k] experts behind those that are there."""
    _append(folder / f"{name}.choice", chosen)


def read_choice(folder: Path, name: str, k: int) -> npt.NDArray[np.uint16]:
    """Returns all [n, k] experts, mapped from disk."""
    file = folder / f"{name}.choice"
    if not file.stat().st_size:
        return np.empty((0, k), np.uint16)
    return np.memmap(file, np.uint16, "r").reshape(-1, k)


def _append(file: Path, array: Array) -> None:
    with file.open("ab") as stream:
        stream.write(np.ascontiguousarray(array).tobytes())
