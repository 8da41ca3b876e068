"""How far two arrays are apart: over the largest value of all, and over the largest of each output feature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.engine.proposal import Rewrite

Array = npt.NDArray[Any]

TOLERANCE = {ir.DataType.FLOAT16.numpy(): 1e-3, ir.DataType.BFLOAT16.numpy(): 8e-3}
"""Largest error over the largest expected magnitude; 1e-5 for every other type. Half types round their outputs."""

_FEATURE = 100
"""How much farther apart a feature may be, over its own largest value: small ones are differences of large ones."""

_ROUNDING = 8
"""Steps of its type, at the largest value of all, that a feature may be off whatever its own values are."""


@dataclass(frozen=True)
class Difference:
    """How far the two sides of a rewrite are apart in one output.

    Attributes:
        value: name of the output.
        error: largest difference over the largest expected magnitude.
        tolerance: largest error allowed.
        where: index of the largest difference.
        dtype: of the output.
        shapes: expected and actual shape, where they differ.
        types: expected and actual element type, where they differ.
    """

    value: str
    error: float
    tolerance: float
    where: tuple[int, ...]
    dtype: np.dtype[Any]
    shapes: tuple[tuple[int, ...], ...] = ()
    types: tuple[np.dtype[Any], ...] = ()

    @property
    def holds(self) -> bool:
        """Whether the sides agree; NaN does not."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        if self.shapes:
            expected, actual = (list(shape) for shape in self.shapes)
            return f"'{self.value}' has shape {actual} in the place of {expected}"
        if self.types:
            expected_type, actual_type = self.types
            return f"'{self.value}' has type {actual_type} in the place of {expected_type}"
        return (
            f"'{self.value}' differs by {self.error:.3g} of its largest value at {self.where}, more than"
            f" {self.tolerance:g}"
        )


def differences(
    rewrite: Rewrite, names: Mapping[ir.Value, str], expected: Mapping[str, Array], actual: Mapping[str, Array]
) -> list[Difference]:
    """Returns how far each output's replacement is from it."""
    found = []
    for old, new in rewrite.outputs.items():
        own, other = expected[names[old]], actual[names[new]]
        error, where = relative(own, other)
        shapes = () if own.shape == other.shape else (own.shape, other.shape)
        types = () if own.dtype == other.dtype else (own.dtype, other.dtype)
        tolerance = TOLERANCE.get(own.dtype, 1e-5)
        error = float("inf") if types else error
        found.append(Difference(old.name or "", error, tolerance, where, own.dtype, shapes, types))
    return found


def relative(expected: Array, actual: Array) -> tuple[float, tuple[int, ...]]:
    """Returns the largest difference over the largest expected magnitude, and where it is.

    A feature (an index of the last axis) that is far off by its own measure counts too, however small it is beside the
    others. What is not finite must be the same on both sides.
    """
    if expected.shape != actual.shape:
        return float("inf"), ()
    if not expected.size:
        return 0.0, ()
    if np.array_equal(expected, actual):  # as movement alone leaves it
        return 0.0, (0,) * expected.ndim
    wide, got = expected.astype(np.float64), actual.astype(np.float64)
    same = (wide == got) | (np.isnan(wide) & np.isnan(got))
    finite = np.isfinite(wide) & np.isfinite(got)
    if not (same | finite).all():
        return float("inf"), tuple(int(i) for i in np.argwhere(~(same | finite))[0])
    wide, got = np.where(finite, wide, 0.0), np.where(finite, got, 0.0)
    difference = np.abs(wide - got)
    scale = float(np.abs(wide).max())
    errors = difference / scale if scale else difference
    if expected.ndim and scale:
        floor = _ROUNDING * float(np.finfo(expected.dtype).eps if _is_float(expected) else 0) * scale
        own = np.abs(wide).reshape(-1, wide.shape[-1]).max(axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            errors = np.where(difference > floor, np.maximum(errors, difference / (_FEATURE * own)), errors)
    where = tuple(int(i) for i in np.unravel_index(int(np.argmax(errors)), errors.shape))
    return float(errors[where]), where


def _is_float(array: Array) -> bool:
    return np.issubdtype(array.dtype, np.floating)
