import numpy as np
import pytest
from quantize_cases import block_errors, context, distributions, ort_k_quant, ort_rtn, relative

from rewriter.quantize import mse_search


@pytest.mark.parametrize(("block", "share"), [(32, 0.95), (128, 0.965)])
def test_four_bits_beat_orts_k_quant(block, share):
    pytest.importorskip("onnxruntime")
    for name, weight in distributions((256, 4096)).items():
        ours = mse_search.quantize(weight, context("mse-search", 4, block))
        assert relative(weight, ours) <= share * relative(weight, ort_k_quant(weight, 4, block)), name


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_beats_orts_rtn(bits, symmetric):
    pytest.importorskip("onnxruntime")
    for block in (16, 32, 128):
        for name, weight in distributions((64, 2048)).items():
            ours = mse_search.quantize(weight, context("mse-search", bits, block, symmetric))
            assert relative(weight, ours) < 0.98 * relative(weight, ort_rtn(weight, bits, block, symmetric)), name


@pytest.mark.parametrize("bits", [2, 4])
def test_is_close_to_the_optimum_of_an_exhaustive_search(bits):
    weight = np.random.default_rng(0).standard_normal((8, 24), np.float32)
    found = block_errors(weight, mse_search.quantize(weight, context("mse-search", bits, 24)))
    top = (1 << bits) - 1
    zero = np.arange(top + 1.0)[:, None, None]
    scale = np.geomspace(0.02, 4, 2000)[None, :, None]
    for row, error in zip(weight.astype(np.float64), found[:, 0], strict=True):
        levels = np.clip(np.rint(row / scale), -zero, top - zero)
        best = ((row - scale * levels) ** 2).sum(axis=2).min()
        assert error <= 1.05 * best


@pytest.mark.parametrize("symmetric", [True, False])
def test_importance_is_what_is_minimised(symmetric):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 512), np.float32)
    importance = rng.exponential(size=512) ** 2
    with_it = mse_search.quantize(weight, context("mse-search", symmetric=symmetric, importance=importance))
    without = mse_search.quantize(weight, context("mse-search", symmetric=symmetric))
    assert block_errors(weight, with_it, importance).sum() < 0.85 * block_errors(weight, without, importance).sum()
    assert block_errors(weight, with_it).sum() > block_errors(weight, without).sum()


def test_only_ratios_of_the_importance_matter():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((8, 64), np.float32)
    importance = rng.exponential(size=64)
    codes = [
        mse_search.quantize(weight, context("mse-search", importance=importance * factor)).codes
        for factor in (2.0**-200, 1.0, 2.0**200)
    ]
    np.testing.assert_array_equal(codes[0], codes[1])
    np.testing.assert_array_equal(codes[2], codes[1])


def test_outliers_are_clipped_in_long_rows():
    weight = np.random.default_rng(0).standard_t(4, (8, 8192)).astype(np.float32)
    per_channel = mse_search.quantize(weight, context("mse-search", 4, 0))
    assert relative(weight, per_channel) < 0.25
