"""GPTQ against plain NumPy, and what holds for it whatever a weight saw."""

import threading

import gptq_reference as plain
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quantize_cases import awkward, context, weights

from rewriter.errors import QuantizationError
from rewriter.quantize import ALGORITHMS, check_promise, gptq, mse_search
from rewriter.quantize.blas import one_thread
from rewriter.quantize.formats import E2M1, FORMATS
from rewriter.quantize.hessian import Hessian
from rewriter.quantize.types import WeightContext, WeightSpec


def weight_of(n, k, seed=0):
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)


def inputs_of(count, k, seed=1, rank=None):
    """[count, k] rows as networks have them: a few directions carry most of them, and channels differ in size."""
    rng = np.random.default_rng(seed)
    few = rng.standard_normal((count, rank or k // 4)) @ rng.standard_normal((rank or k // 4, k))
    noise = 0 if rank else 0.5 * rng.standard_normal((count, k))
    return ((few + noise) * np.exp(0.7 * rng.standard_normal(k))).astype(np.float32)


def output_errors(weight, quantized, inputs):
    """[N] squared errors of the outputs."""
    return np.square(inputs.astype(np.float64) @ (quantized.dequantize() - weight).T.astype(np.float64)).sum(axis=0)


FLOATS = ["mxfp4", "nvfp4"]


def about_floats(algorithm, name, **more):
    own = FORMATS[name]
    return WeightContext(WeightSpec(algorithm, 4, own.block, True, name), own.scale_dtype, weight="w", **more)


def quantize(weight, inputs, *more, **options):
    about = context("gptq", *more, activations=lambda: inputs, **options)
    return checked(weight, about)


def quantize_floats(weight, inputs, name):
    return checked(weight, about_floats("gptq", name, activations=lambda: inputs))


def checked(weight, about):
    result = ALGORITHMS["gptq"](weight, about)
    check_promise(result, weight.shape, about)
    return result


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "block", "dtype"),
    [(2, 32, np.float16), (3, 32, np.float16), (4, 16, np.float32), (4, 0, np.float32)],
)
def test_each_step_is_that_of_the_reference(bits, block, dtype, symmetric):
    weight, inputs = weight_of(24, 80), inputs_of(400, 80)
    about = context("gptq", bits, block, symmetric, dtype)
    size, top = block or 80, (1 << bits) - 1
    ours = Hessian.of(inputs, "", 80)
    h = plain.hessian(inputs, ours.added)
    np.testing.assert_allclose(ours.matrix, h, rtol=1e-4, atol=1e-5)
    factor = ours.factor.astype(np.float64)
    np.testing.assert_allclose(factor.T @ factor @ h, np.eye(80), atol=1e-3)

    grid = chunk(weight, about, ours)
    assert grid.round_in_turn()
    codes, scales, zeros = plain.rounded(weight, about, h)
    # A tie that falls the other way in float32 changes what is left of the row's later columns.
    assert (grid.codes == codes).all(axis=1).mean() >= 0.5
    np.testing.assert_allclose(
        plain.cost(weight, grid.codes.astype(float), grid.scales, grid.zeros, size, h).sum(),
        plain.cost(weight, codes, scales, zeros, size, h).sum(),
        rtol=0.02,
    )

    given = grid.scales, grid.zeros, size, top, False, ours.matrix
    start = grid.codes.astype(float)
    rest = grid.rest()
    gptq.descend(grid.codes, *given, rest, rest @ ours.matrix, 1)
    moved = plain.descended(weight, start, grid.scales, grid.zeros.astype(float), size, top, h, 1)
    assert (moved != start).any()
    assert (grid.codes == moved).all(axis=1).mean() >= 0.9

    rest = grid.rest()
    fitted = plain.refitted(weight, grid.codes.astype(float), grid.scales, grid.zeros.astype(float), size, h)
    assert (fitted != grid.scales).any()
    gptq.refit_scales(grid.codes, grid.scales, grid.zeros, size, ours.matrix, rest, rest @ ours.matrix)
    np.testing.assert_allclose(grid.scales, fitted, rtol=1e-3, atol=1e-5)


def chunk(weight, about, hessian):
    """All of a weight on its way, from what the search makes of it."""
    return gptq._Chunk(weight, about, hessian, mse_search.quantize(weight, about), slice(None))


@pytest.mark.parametrize("name", FLOATS)
def test_each_step_with_codes_of_floats_is_that_of_the_reference(name):
    weight, inputs = weight_of(24, 80), inputs_of(400, 80)
    hessian = Hessian.of(inputs, "", 80)
    h = plain.hessian(inputs, hessian.added)
    grid = chunk(weight, about_floats("gptq", name), hessian)
    assert grid.round_in_turn()
    codes, scales = plain.rounded_floats(weight, name, grid._global, h)
    assert (grid.codes == codes).all(axis=1).mean() >= 0.5
    assert np.isclose(grid.scales, scales, rtol=1e-6).mean() >= 0.8
    ours, theirs = (
        plain.cost_floats(weight, *made, FORMATS[name].block, h)
        for made in ((grid.codes, grid.scales), (codes, scales))
    )
    np.testing.assert_allclose(ours.sum(), theirs.sum(), rtol=0.02)
    start = grid.codes.copy()
    grid.refine()
    moved = plain.descended_floats(weight, start, grid.scales, FORMATS[name].block, h, gptq.SWEEPS)
    levels = np.array(E2M1)  # in which the two zeros are one
    assert (levels[moved] != levels[start]).any()
    assert (levels[grid.codes] == levels[moved]).all(axis=1).mean() >= 0.9


@pytest.mark.parametrize("name", FLOATS)
def test_codes_of_floats_are_better_too_on_inputs_that_were_kept_back(name):
    weight, inputs = weight_of(64, 128), inputs_of(4096, 128)
    ours = quantize_floats(weight, inputs[:2048], name)
    assert ours.format == name and not ours.algorithm
    search = mse_search.quantize(weight, about_floats("mse-search", name))
    assert output_errors(weight, ours, inputs[2048:]).sum() < 0.75 * output_errors(weight, search, inputs[2048:]).sum()
    assert not np.array_equal(ours.scales, search.scales)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "block"), [(2, 32), (3, 32), (4, 32), (4, 128), (8, 32)])
def test_inputs_that_were_kept_back_agree_that_it_is_better(bits, block, symmetric):
    weight, inputs = weight_of(64, 128), inputs_of(4096, 128)
    seen, kept = inputs[:2048], inputs[2048:]
    for dtype in (np.float16, ml_dtypes.bfloat16):
        ours = quantize(weight, seen, bits, block, symmetric, dtype)
        search = mse_search.quantize(weight, context("mse-search", bits, block, symmetric, dtype))
        assert output_errors(weight, ours, kept).sum() < 0.75 * output_errors(weight, search, kept).sum()


def test_few_inputs_are_not_believed():
    weight, inputs = weight_of(64, 128), inputs_of(4096, 128)
    search = mse_search.quantize(weight, context("mse-search"))
    expected = output_errors(weight, search, inputs[2048:]).sum()
    for count in (3, 16, 64, 128, 256):
        ours = quantize(weight, inputs[:count])
        assert output_errors(weight, ours, inputs[2048:]).sum() < 1.03 * expected, count


def dead(inputs):
    inputs[:, 5:20] = 0
    return inputs


def alike(inputs):
    inputs[:, 1::2] = inputs[:, ::2]
    return inputs


@pytest.mark.parametrize(
    "inputs",
    [
        inputs_of(3, 96),
        inputs_of(1, 96),
        inputs_of(500, 96, rank=2),
        dead(inputs_of(500, 96)),
        alike(inputs_of(500, 96)),
        inputs_of(500, 96) * np.float32(1e30),
        inputs_of(500, 96) * np.float32(1e-30),
        inputs_of(500, 96) * np.where(np.arange(96) == 7, 1e5, 1).astype(np.float32),
    ],
    ids=["three", "one", "rank-2", "dead", "alike", "huge", "tiny", "one-huge-channel"],
)
def test_it_is_never_worse_on_its_inputs_than_mse_search(inputs):
    for weight in (weight_of(32, 96), awkward(96)):
        for bits, symmetric in ((4, False), (2, True), (3, True)):
            ours = quantize(weight, inputs, bits, 32, symmetric, np.float16)
            search = mse_search.quantize(weight, context("mse-search", bits, 32, symmetric, np.float16))
            hold_no_worse(weight, ours, search, inputs)
        for name in FLOATS:
            ours = quantize_floats(weight, inputs, name)
            hold_no_worse(weight, ours, mse_search.quantize(weight, about_floats("mse-search", name)), inputs)


def hold_no_worse(weight, ours, search, inputs):
    scaled = inputs / np.abs(inputs).max()
    worst = output_errors(weight, search, scaled)
    assert (output_errors(weight, ours, scaled) <= 1.01 * worst + 1e-9 * worst.max()).all()


@settings(max_examples=25)
@given(weights(), st.sampled_from(["int3", "int4", *FLOATS]), st.integers(0, 40), st.integers(0, 99))
def test_whatever_a_weight_is_and_saw_it_keeps_its_promise_and_is_no_worse(weight, form, count, seed):
    inputs = inputs_of(count, weight.shape[1], seed, rank=1 + count // 4)
    inputs[:, seed % weight.shape[1]] = 0
    if form in FLOATS:
        ours, about = quantize_floats(weight, inputs, form), about_floats("mse-search", form)
    else:
        spec = (int(form[-1]), 16, seed % 2 == 0, weight.dtype)
        ours, about = quantize(weight, inputs, *spec), context("mse-search", *spec)
        assert form != "int3" or (ours.scales.astype(np.float32) >= 0).all()
    if count and inputs.any():
        peak = np.abs(weight).astype(np.float64).max() or 1.0
        errors = []
        for quantized in (ours, mse_search.quantize(weight, about)):
            rest = (quantized.dequantize().astype(np.float64) - weight.astype(np.float64)) / peak
            errors.append(np.square(inputs / np.abs(inputs).max() @ rest.T).sum(axis=0))
        assert (errors[0] <= 1.01 * errors[1] + 1e-6 * errors[1].max() + 1e-12).all()


@pytest.mark.parametrize("magnitude", [1e-40, 1e-30, 1e30, 5e37])
def test_weights_of_any_magnitude(magnitude):
    weight = (weight_of(8, 64) * magnitude / 4).astype(np.float32)
    inputs = inputs_of(200, 64)
    ours = quantize(weight, inputs)
    search = mse_search.quantize(weight, context("mse-search"))
    assert np.isfinite(ours.dequantize()).all()
    peak = np.abs(weight).max()
    norms = [np.square(inputs @ ((q.dequantize() - weight) / peak).T).sum() for q in (ours, search)]
    assert norms[0] <= 1.01 * norms[1]


def test_rows_whose_squares_are_0_in_float32_are_not_made_worse():
    weight = (weight_of(64, 18) * 3e-39).astype(np.float32)
    inputs = inputs_of(1, 18, 4)
    ours = quantize(weight, inputs, 3, 16, True, np.float32)
    search = mse_search.quantize(weight, context("mse-search", 3, 16, True, np.float32))
    errors = []
    for quantized in (ours, search):
        rest = (quantized.dequantize().astype(np.float64) - weight.astype(np.float64)) / np.abs(weight).max()
        errors.append(np.square(inputs @ rest.T).sum(axis=0))
    assert (errors[0] <= 1.01 * errors[1] + 1e-6).all()


@pytest.mark.parametrize("inputs", [None, np.empty((0, 64), np.float32), np.zeros((9, 64), np.float32)])
def test_without_inputs_it_is_mse_search_and_says_so(inputs):
    weight = weight_of(16, 64)
    about = context("gptq", activations=None if inputs is None else lambda: inputs)
    ours, search = gptq.quantize(weight, about), mse_search.quantize(weight, about)
    assert ours.algorithm == "mse-search"
    assert np.array_equal(ours.codes, search.codes) and np.array_equal(ours.scales, search.scales)
    assert quantize(weight, inputs_of(99, 64)).algorithm == ""


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (np.ones((5, 63), np.float32), r"has 64 input features; its activations have shape \[5, 63\]"),
        (np.ones(64, np.float32), "its activations have shape"),
        (np.full((5, 64), np.nan, np.float32), "hold NaN or infinity"),
    ],
)
def test_inputs_that_do_not_fit_are_one_clear_line(inputs, message):
    with pytest.raises(QuantizationError, match=message):
        quantize(weight_of(4, 64), inputs)


def test_a_weight_that_is_not_finite_is_refused():
    weight = weight_of(4, 64)
    weight[2, 3] = np.inf
    with pytest.raises(QuantizationError, match="NaN or infinity"):
        quantize(weight, inputs_of(99, 64))


def test_the_same_bytes_whatever_else_runs():
    weight, inputs = weight_of(300, 160), inputs_of(9000, 160)
    first = quantize(weight, inputs, 4, 32, False, np.float16)
    found = []
    work = lambda: found.append(quantize(weight, inputs, 4, 32, False, np.float16))  # noqa: E731 -- three threads share it
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for other in found:
        assert np.array_equal(first.codes, other.codes)
        assert first.scales.tobytes() == other.scales.tobytes()
        assert np.array_equal(first.zero_points, other.zero_points)


def test_blas_has_its_threads_again_afterwards():
    from threadpoolctl import threadpool_info

    def threads():
        return {info["num_threads"] for info in threadpool_info() if info["user_api"] == "blas"}

    before = threads()
    with one_thread():
        inside = threading.Thread(target=lambda: quantize(weight_of(8, 64), inputs_of(99, 64)))
        inside.start()
        inside.join()
        assert threads() <= {1}
    assert threads() == before


def test_a_transposed_factor_is_noticed():
    weight, inputs = weight_of(32, 64), inputs_of(900, 64)
    right = Hessian.of(inputs, "", 64)
    turned = Hessian(right.matrix, np.ascontiguousarray(right.factor.T), right.added)
    about = context("gptq")
    costs = []
    for hessian in (right, turned):
        grid = chunk(weight, about, hessian)
        grid.round_in_turn()
        costs.append(grid.costs().sum())
    assert costs[1] > 1.2 * costs[0]
