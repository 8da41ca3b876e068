"""What holds for every algorithm."""

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from quantize_cases import DTYPES, awkward, block_errors, context, distributions, relative, weights

from rewriter.errors import QuantizationError
from rewriter.quantize import ALGORITHMS, check_promise, relative_rms

REFERENCES = {
    "rtn": reference.rtn,
    "k-quant": reference.k_quant,
    "mse-search": reference.mse_search,
    "gptq": reference.mse_search,
}
every_algorithm = pytest.mark.parametrize("algorithm", REFERENCES)


def quantize(algorithm, weight, *more, **options):
    about = context(algorithm, *more, **options)
    result = ALGORITHMS[algorithm](weight, about)
    check_promise(result, weight.shape, about)
    return result


@settings(max_examples=150, deadline=None)
@given(weights(), st.sampled_from([2, 4, 8]), st.sampled_from([0, 16, 32, 100]), st.booleans(), st.sampled_from(DTYPES))
def test_every_finite_weight_is_quantized_no_worse_than_by_rtn(weight, bits, block, symmetric, scale_dtype):
    try:
        plain = quantize("rtn", weight, bits, block, symmetric, scale_dtype)
    except QuantizationError as error:
        assert scale_dtype == np.float16 and "float16 cannot hold" in str(error)
        return
    before = weight.astype(np.float64)
    limit = block_errors(weight, plain)
    for algorithm in ("k-quant", "mse-search"):
        result = quantize(algorithm, weight, bits, block, symmetric, scale_dtype)
        assert (block_errors(weight, result) <= limit * (1 + 1e-5) + 1e-13 * np.sum(before**2, axis=1)[:, None]).all()
    np.testing.assert_array_equal(weight.astype(np.float64), before)


@every_algorithm
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_agrees_with_the_reference(algorithm, bits, symmetric):
    rng = np.random.default_rng(bits)
    for block, dtype in ((32, np.float32), (32, np.float16), (128, ml_dtypes.bfloat16), (0, np.float32)):
        weight = rng.standard_t(4, (16, 320)).astype(dtype)
        importance = rng.random(320) if dtype == np.float16 else None
        about = context(algorithm, bits, block, symmetric, dtype, importance=importance)
        fast, plain = ALGORITHMS[algorithm](weight, about), REFERENCES[algorithm](weight, about)
        errors, expected = (block_errors(weight, q, importance) for q in (fast, plain))
        # Float32 sums now and then prefer another of two candidates that are nearly as good.
        others = np.abs(errors - expected) > 1e-5 * expected
        assert others.mean() <= 0.07
        assert (errors[others] < 1.5 * expected[others]).all() and (expected[others] < 1.5 * errors[others]).all()


@every_algorithm
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_awkward_rows(algorithm, dtype):
    weight = awkward(96, dtype)
    for bits in (2, 3, 4, 8):
        result = quantize(algorithm, weight, bits, 32, False, dtype)
        back = result.dequantize()
        assert (back[1] == 0).all()
        np.testing.assert_allclose(back[2], 0.3, rtol=2 * float(ml_dtypes.finfo(dtype).eps))
        assert (back[3] >= 0).all() and (back[4] <= 0).all()
        np.testing.assert_allclose(back[5], weight[5].astype(np.float32), rtol=2 * float(ml_dtypes.finfo(dtype).eps))


@every_algorithm
@pytest.mark.parametrize("magnitude", [1e-44, 1e-39, 1e-30, 1e30, 5e37])
def test_the_error_does_not_depend_on_the_magnitude(algorithm, magnitude):
    weight = distributions((8, 256))["normal"]
    scaled = weight * np.float32(magnitude)
    ratio = relative(scaled, quantize(algorithm, scaled, 4, 32, True))
    if magnitude < 1e-40:  # few bits are left of such weights
        assert ratio < 0.6
    else:
        assert ratio < 1.05 * relative(weight, quantize(algorithm, weight, 4, 32, True))


@every_algorithm
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_weights_are_an_error_that_names_the_weight(algorithm, bad, dtype):
    weight = np.zeros((5, 70), dtype)
    weight[3, 69] = bad
    with pytest.raises(QuantizationError, match=r"^weight 'layer\.0\.down' holds NaN or infinity"):
        quantize(algorithm, weight, dtype=dtype)


@every_algorithm
def test_a_scale_that_its_dtype_cannot_hold_is_an_error(algorithm):
    weight = np.full((2, 32), 3e6, np.float32)
    with pytest.raises(QuantizationError, match=r"'layer\.0\.down' needs a scale that float16 cannot hold"):
        quantize(algorithm, weight, dtype=np.float16)


@every_algorithm
def test_what_cannot_be_read_is_declined(algorithm):
    fine = np.ones((4, 32), np.float32)
    for weight, options, message in (
        (fine.astype(np.float64), {}, "it is float64"),
        (fine[0], {}, r"its shape is \[32\]"),
        (fine[:0], {}, r"its shape is \[0, 32\]"),
        (fine, {"dtype": np.float64}, "its scale is float64"),
        (fine, {"bits": 5}, "bits 5"),
        (fine, {"importance": np.ones(31)}, r"importance has shape \[31\]; expected \[32\]"),
        (fine, {"importance": np.full(32, np.nan)}, "negative, NaN or infinite"),
        (fine, {"importance": np.full(32, -1.0)}, "negative, NaN or infinite"),
    ):
        with pytest.raises(QuantizationError, match=rf"'layer\.0\.down' cannot be quantized: .*{message}"):
            ALGORITHMS[algorithm](weight, context(algorithm, **options))


@every_algorithm
def test_no_importance_and_zero_importance_are_quantized(algorithm):
    weight = distributions((4, 64))["normal"]
    assert relative(weight, quantize(algorithm, weight, importance=np.zeros(64))) < 0.1
    np.testing.assert_array_equal(
        quantize(algorithm, weight, importance=np.full(64, 3.0)).codes, quantize(algorithm, weight).codes
    )


@every_algorithm
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_chunks_do_not_change_the_result(algorithm, dtype):
    weight = distributions((700, 1030))["normal"].astype(dtype)  # three chunks, a partial block and a partial tile
    whole = quantize(algorithm, weight, dtype=dtype)
    transposed = quantize(algorithm, np.ascontiguousarray(weight.T).T, dtype=dtype)
    np.testing.assert_array_equal(whole.codes, transposed.codes)
    for rows in (slice(0, 5), slice(250, 260), slice(690, 700)):
        part = quantize(algorithm, weight[rows], dtype=dtype)
        np.testing.assert_array_equal(whole.codes[rows], part.codes)
        np.testing.assert_array_equal(whole.scales[rows], part.scales)
        np.testing.assert_array_equal(whole.zero_points[rows], part.zero_points)


def test_every_processor_computes_the_same_bytes():
    """Vector widths decide how many blocks are fitted at a time, not what any of them becomes."""
    weight = (np.random.default_rng(0).integers(-(2**20), 2**20, (40, 300)) ** 3 / 2.0**60).astype(np.float32)
    found = {}
    for algorithm in ("k-quant", "mse-search"):
        digest = hashlib.sha256()
        for bits, symmetric in ((2, False), (3, True), (4, False), (4, True), (8, False)):
            for importance in (None, np.arange(1, 301) % 7):
                made = quantize(algorithm, weight, bits, 32, symmetric, np.float16, importance=importance)
                digest.update(made.codes.tobytes() + made.scales.tobytes())
        found[algorithm] = digest.hexdigest()[:16]
    assert found == {"k-quant": "5cb2c5db7cca1d9c", "mse-search": "e789a80311d5b2c0"}


@every_algorithm
def test_many_threads_may_quantize_at_once(algorithm):
    weights_ = [np.random.default_rng(i).standard_normal((600, 1024), np.float32) for i in range(6)]
    alone = [quantize(algorithm, w).codes for w in weights_]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda w: quantize(algorithm, w), weights_))
        errors = list(pool.map(relative_rms, weights_, together))
    for expected, result, weight, error in zip(alone, together, weights_, errors, strict=True):
        np.testing.assert_array_equal(result.codes, expected)
        assert error == pytest.approx(relative(weight, result), rel=1e-6)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processors of a process are Linux's")
def test_threads_are_as_many_as_the_processors_that_the_process_may_use():
    script = "from rewriter.quantize import rows; print(rows._pool()._max_workers)"
    one = {min(os.sched_getaffinity(0))}
    done = subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, one),
    )
    assert done.stdout.strip() == "1"
