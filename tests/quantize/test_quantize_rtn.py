import ml_dtypes
import numpy as np
import pytest
import reference
from quantize_cases import awkward, context, ort_rtn

from rewriter.quantize import rtn


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_is_ort_bit_for_bit(dtype, bits, symmetric):
    pytest.importorskip("onnxruntime")
    for block in (16, 32, 64, 128, 256):
        for k in (256, 272, 100):
            weight = awkward(k, dtype, seed=k + block)
            ours = rtn.quantize(weight, context("rtn", bits, block, symmetric, dtype))
            theirs = ort_rtn(weight, bits, block, symmetric)
            np.testing.assert_array_equal(ours.codes, theirs.codes)
            assert ours.scales.tobytes() == theirs.scales.tobytes()
            if not symmetric:
                np.testing.assert_array_equal(ours.zero_points, theirs.zero_points)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_is_the_reference(dtype, bits, symmetric):
    for block in (0, 32, 48):
        weight = awkward(100, dtype)
        about = context("rtn", bits, block, symmetric, dtype)
        ours, plain = rtn.quantize(weight, about), reference.rtn(weight, about)
        np.testing.assert_array_equal(ours.codes, plain.codes)
        np.testing.assert_array_equal(ours.scales, plain.scales)
        if not symmetric:
            np.testing.assert_array_equal(ours.zero_points, plain.zero_points)


def test_half_of_the_symmetric_scales_are_negative():
    weight = np.random.default_rng(0).standard_normal((64, 512), np.float32)
    scales = rtn.quantize(weight, context("rtn", symmetric=True)).scales
    assert 0.4 < np.mean(scales < 0) < 0.6


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_codes_are_the_nearest_for_the_scale_as_it_is_stored(dtype):
    weight = np.random.default_rng(0).standard_normal((32, 512), np.float32)
    result = rtn.quantize(weight, context("rtn", 8, 512, True, dtype))
    exact = weight / result.scales.astype(np.float32)
    inside = np.abs(exact) < 127
    assert np.abs(result.codes - 128.0 - exact)[inside].max() < 0.5001
