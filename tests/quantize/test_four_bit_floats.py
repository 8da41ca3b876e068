"""mxfp4 and nvfp4 of weights that were not trained in them, and 3 bits without negative scales."""

import ml_dtypes
import numpy as np
import pytest
from quantize_cases import context

from rewriter.errors import QuantizationError
from rewriter.quantize import ALGORITHMS, check_promise, relative_rms
from rewriter.quantize.formats import FORMATS
from rewriter.quantize.types import WeightContext, WeightSpec


def about(algorithm, name, **more):
    own = FORMATS[name]
    return WeightContext(WeightSpec(algorithm, 4, own.block, True, name), own.scale_dtype, weight="w", **more)


@pytest.mark.parametrize(("name", "plain", "searched"), [("mxfp4", 0.115, 0.1116), ("nvfp4", 0.095, 0.0812)])
def test_the_search_beats_the_plain_rule(name, plain, searched):
    weight = np.random.default_rng(0).standard_normal((256, 1024)).astype(np.float16)
    for algorithm, expected in (("rtn", plain), ("mse-search", searched)):
        found = ALGORITHMS[algorithm](weight, about(algorithm, name))
        check_promise(found, weight.shape, about(algorithm, name))
        assert relative_rms(weight, found) == pytest.approx(expected, abs=3e-4)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_codes_are_the_nearest_and_ties_go_to_even(name):
    own = FORMATS[name]
    weight = np.random.default_rng(1).standard_normal((32, 96)).astype(np.float32)
    weight[:, 0] = 6.0  # the scale is 1
    found = ALGORITHMS["rtn"](weight, about("rtn", name))
    scales = np.repeat(found.scales.astype(np.float32) * np.float32(found.global_scale), own.block, axis=1)
    nearest = (weight / scales).astype(ml_dtypes.float4_e2m1fn)
    np.testing.assert_array_equal(found.dequantize(), nearest.astype(np.float32) * scales)


def test_importance_decides_which_error_counts():
    weight = np.full((1, 32), 0.01, np.float32)
    weight[0, 0] = 0.7
    last = np.zeros(32)
    last[-1] = 1.0
    heeded = ALGORITHMS["mse-search"](weight, about("mse-search", "mxfp4", importance=last))
    plain = ALGORITHMS["mse-search"](weight, about("mse-search", "mxfp4"))
    assert abs(heeded.dequantize()[0, -1] - 0.01) <= abs(plain.dequantize()[0, -1] - 0.01)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_awkward_weights(name):
    weight = np.zeros((3, 64), np.float32)
    weight[1], weight[2] = 1e-30, -3e5
    found = ALGORITHMS["mse-search"](weight, about("mse-search", name))
    check_promise(found, weight.shape, about("mse-search", name))
    assert (found.dequantize()[0] == 0).all() and np.isfinite(found.dequantize()).all()
    weight[0, 0] = np.nan
    with pytest.raises(QuantizationError, match="'w' holds NaN"):
        ALGORITHMS["rtn"](weight, about("rtn", name))
    with pytest.raises(QuantizationError, match="k-quant fits integers"):
        ALGORITHMS["k-quant"](weight, about("k-quant", name))


@pytest.mark.parametrize("algorithm", ["rtn", "k-quant", "mse-search"])
def test_three_bits_have_no_negative_scales(algorithm):
    weight = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float16)
    errors = []
    for bits in (2, 3, 4):
        found = ALGORITHMS[algorithm](weight, context(algorithm, bits, 32, True, np.dtype(np.float16)))
        assert bits != 3 or (found.scales >= 0).all()
        errors.append(relative_rms(weight, found))
    assert errors == sorted(errors, reverse=True)
