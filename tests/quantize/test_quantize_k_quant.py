import numpy as np
import pytest
from quantize_cases import awkward, block_errors, context, distributions, ort_k_quant, relative

from rewriter.quantize import k_quant


@pytest.mark.parametrize("block", [16, 32, 128, 256])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_error_is_no_higher_than_orts(bits, block):
    pytest.importorskip("onnxruntime")
    for name, weight in distributions((64, 2048)).items():
        ours = k_quant.quantize(weight, context("k-quant", bits, block))
        assert relative(weight, ours) <= relative(weight, ort_k_quant(weight, bits, block)), name


def test_blocks_that_do_not_span_zero_survive():
    weight = awkward(128)[2:5]
    result = k_quant.quantize(weight, context("k-quant"))
    np.testing.assert_allclose(result.dequantize()[0], 0.3, rtol=1e-6)
    assert relative(weight, result) < 0.08


def test_importance_lowers_the_error_where_it_is_high():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 512), np.float32)
    importance = rng.exponential(size=512) ** 2
    with_it = k_quant.quantize(weight, context("k-quant", importance=importance))
    without = k_quant.quantize(weight, context("k-quant"))
    assert block_errors(weight, with_it, importance).sum() < 0.97 * block_errors(weight, without, importance).sum()
