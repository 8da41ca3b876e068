"""Halves are rounded by compiled code as NumPy rounds them, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from rewriter.quantize.halves import narrow
from rewriter.quantize.rows import put

HALVES = np.arange(1 << 15, dtype=np.uint16).view(np.float16).astype(np.float32)
FINITE = HALVES[np.isfinite(HALVES)]
MIDDLES = ((FINITE[:-1].astype(np.float64) + FINITE[1:]) / 2).astype(np.float32)


@pytest.mark.parametrize(
    "numbers",
    [
        HALVES,
        MIDDLES,
        np.nextafter(MIDDLES, np.float32(0)),
        np.nextafter(MIDDLES, np.float32(np.inf)),
        np.array([65504, 65519.996, 65520, 1e5, 3.4e38, np.inf, np.nan, 2.0**-25, 2.0**-149], np.float32),
        np.arange(0, 1 << 32, 4099, dtype=np.uint32).view(np.float32),
    ],
    ids=["halves", "ties", "below ties", "above ties", "ends", "all float32"],
)
def test_halves_are_rounded_as_numpy_rounds_them(numbers: np.ndarray) -> None:
    numbers = np.concatenate([numbers, -numbers])
    found = np.empty(numbers.shape, np.float16)
    narrow(numbers, found.view(np.int16))
    with np.errstate(over="ignore", invalid="ignore"):
        expected = numbers.astype(np.float16)
    there = ~np.isnan(expected)
    assert np.array_equal(found.view(np.int16)[there], expected.view(np.int16)[there])
    assert np.isnan(found[~there]).all()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("turned", [False, True])
def test_numbers_are_put_into_any_array(dtype: str, turned: bool) -> None:
    numbers = np.random.default_rng(0).standard_normal((5, 7), np.float32)
    into = np.empty((7, 5), dtype).T if turned else np.empty((5, 7), dtype)
    put(numbers, into)
    assert np.array_equal(into, numbers.astype(dtype))
