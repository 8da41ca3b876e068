import math

import numpy as np
import pytest
from quantize_cases import DTYPES, awkward, context, relative

from rewriter.quantize import QuantizedWeight, relative_rms, rtn
from rewriter.quantize.error import relative_output_rms


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [0, 16, 128])
def test_is_the_norm_of_the_error_over_the_norm_of_the_weight(dtype, symmetric, block):
    weight = awkward(100, dtype)
    for view in (weight, np.ascontiguousarray(weight.T).T):
        result = rtn.quantize(view, context("rtn", 4, block, symmetric, dtype))
        assert relative_rms(view, result) == pytest.approx(relative(weight, result), rel=1e-5)


def test_codes_of_a_users_own_quantizer_may_be_strided():
    weight = awkward(64)
    result = rtn.quantize(weight, context("rtn"))
    strided = QuantizedWeight(
        np.asfortranarray(result.codes), np.asfortranarray(result.scales), np.asfortranarray(result.zero_points), 4, 32
    )
    assert relative_rms(weight, strided) == relative_rms(weight, result)


def test_zero_weights():
    zero = np.zeros((2, 32), np.float32)
    result = rtn.quantize(zero, context("rtn"))
    assert relative_rms(zero, result) == 0
    wrong = QuantizedWeight(result.codes, np.ones_like(result.scales), np.ones_like(result.zero_points), 4, 32)
    assert relative_rms(zero, wrong) == math.inf


def test_large_weights_do_not_overflow():
    weight = np.full((2, 32), 3e38, np.float32)
    assert relative_rms(weight, rtn.quantize(weight, context("rtn"))) < 1e-6


@pytest.mark.parametrize("size", [1e-38, 1e-25, 1e-9, 1, 1e18, 1e37])
def test_squares_that_float32_has_no_room_for_count_too(size):
    weight = (size * np.random.default_rng(0).standard_normal((70, 64))).astype(np.float32)
    weight[:, 32:] *= np.float32(1e-6)
    result = rtn.quantize(weight, context("rtn"))
    assert relative_rms(weight, result) == pytest.approx(relative(weight, result), rel=1e-5)
    wrong = QuantizedWeight(result.codes, 3 * result.scales, result.zero_points, 4, 32)
    assert relative_rms(weight, wrong) == pytest.approx(relative(weight, wrong), rel=1e-5)


@pytest.mark.parametrize("shape", [(300, 32), (1, 9000), (5, 4097), (41, 100)])
def test_halves_are_measured_row_by_row_however_many_are_read_at_once(shape):
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float16)
    weight[-1] *= 100
    result = rtn.quantize(weight, context("rtn", 4, 32, False, np.float16))
    assert relative_rms(weight, result) == pytest.approx(relative(weight, result), rel=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_error_of_the_output_is_that_of_the_products(dtype):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((24, 32)).astype(dtype)
    quantized = rtn.quantize(weight, context("rtn", 4, 16, True, dtype))
    x = rng.standard_normal((40, 32)).astype(np.float32) * np.linspace(0.1, 3, 32, dtype=np.float32)
    exact, approximate = (x @ w.astype(np.float32).T for w in (weight, quantized.dequantize()))
    expected = np.linalg.norm(approximate - exact) / np.linalg.norm(exact)
    assert relative_output_rms(weight, quantized, x) == pytest.approx(expected, rel=1e-4)
    many = np.repeat(x, 100, axis=0)
    assert relative_output_rms(weight, quantized, many) == pytest.approx(expected, rel=0.1)
    assert relative_output_rms(weight, quantized, x[:0]) is None
    assert relative_output_rms(weight, quantized, 0 * x) is None
