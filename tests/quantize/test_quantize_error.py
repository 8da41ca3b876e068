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
