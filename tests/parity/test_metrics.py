"""Metrics: known values, and stated answers for everything that is not finite."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rewriter.errors import ParityError
from rewriter.parity.metrics import Metrics, compare

NAN, INF = math.nan, math.inf


def test_equal_arrays() -> None:
    values = np.array([[1.0, -2.0], [INF, NAN]], np.float32)
    assert compare(values, values.copy()) == Metrics(0.0, 0.0, (), 1.0, INF, finite=0.5)
    assert compare(np.zeros((0, 3)), np.zeros((0, 3))) == Metrics(0.0, 0.0, (), 1.0, INF)
    assert compare(np.array(True), np.array(True)).snr_db == INF


def test_known_values() -> None:
    found = compare(np.array([[3.0, 0.0], [0.0, 4.0]]), np.array([[3.0, 0.0], [0.0, 4.5]]))
    assert found.relative_l2 == pytest.approx(0.1)
    assert found.max_abs == 0.5
    assert found.worst_index == (1, 1)
    assert found.cosine == pytest.approx((9 + 18) / 5 / math.sqrt(9 + 4.5**2))
    assert found.snr_db == pytest.approx(20)
    assert found.top1 is None and found.kl is None
    assert compare(np.array([1.0, 2.0]), np.array([-1.0, -2.0])).cosine == pytest.approx(-1)
    assert compare(np.array(2.0), np.array(3.0)).worst_index == ()


def test_zero_expected() -> None:
    found = compare(np.zeros(2), np.array([0.0, 1.0]))
    assert (found.relative_l2, found.max_abs, found.cosine, found.snr_db) == (INF, 1.0, 0.0, -INF)


@pytest.mark.parametrize(("e", "a"), [(1.0, NAN), (NAN, 1.0), (1.0, INF), (INF, -INF), (INF, NAN)])
def test_one_sided_non_finite(e: float, a: float) -> None:
    found = compare(np.array([5.0, e]), np.array([5.0, a]), logits=True)
    assert found == Metrics(INF, INF, (1,), 0.0, -INF, 0.0, INF, 0.5, undefined=e != 1.0)


def test_shared_non_finite_is_left_out() -> None:
    found = compare(np.array([NAN, INF, 3.0, 4.0]), np.array([NAN, INF, 3.0, 4.5]))
    assert (found.relative_l2, found.worst_index) == (pytest.approx(0.1), (3,))


def test_logits() -> None:
    expected = np.log(np.array([[0.5, 0.5], [0.25, 0.75]]))
    actual = np.log(np.array([[0.9, 0.1], [0.75, 0.25]]))
    found = compare(expected, actual, logits=True)
    assert found.top1 == 0.5
    first = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    second = 0.25 * math.log(0.25 / 0.75) + 0.75 * math.log(0.75 / 0.25)
    assert found.kl == pytest.approx((first + second) / 2)
    masked = np.array([[1.0, -INF], [NAN, 1.0]])
    assert (compare(masked, masked, logits=True).top1, compare(masked, masked, logits=True).kl) == (1.0, 0.0)
    shifted = compare(expected, expected + 7, logits=True)
    assert shifted.kl == pytest.approx(0, abs=1e-12) and shifted.top1 == 1.0


def test_shapes_must_agree() -> None:
    with pytest.raises(ParityError, match=r"\[2\] expected, \[3\] found"):
        compare(np.zeros(2), np.zeros(3))


@given(
    hnp.arrays(np.float32, (3, 4), elements=st.floats(width=32)),
    hnp.arrays(np.float32, (3, 4), elements=st.floats(width=32)),
)
def test_any_arrays_are_measured(expected: np.ndarray, actual: np.ndarray) -> None:
    found = compare(expected, actual, logits=True)
    assert found.relative_l2 >= 0 and found.max_abs >= 0 and -1 <= found.cosine <= 1
    assert not math.isnan(found.snr_db)
    assert (found.relative_l2 == 0) == np.array_equal(expected, actual, equal_nan=True) or found.relative_l2 < 1e-30
    assert compare(expected, expected).max_abs == 0


def test_agreeing_on_nothing_finite_is_no_comparison() -> None:
    nothing = np.array([NAN, INF])
    assert not compare(nothing, nothing).compared
    assert compare(nothing, np.zeros(2)).compared
    assert compare(np.zeros(0), np.zeros(0)).compared
