"""Weights at the edge of their type."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

import rewriter
from rewriter.errors import QuantizationError
from rewriter.quantize import ALGORITHMS, WeightContext, WeightSpec, k_quant, relative_rms, rows
from rewriter.quantize.lanes import LANES
from rewriter.quantize.measured import same
from rewriter.quantize.rows import over_rows
from rewriter.quantize.types import largest


def model(largest):
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float16)
    weight[3, 5], weight[9, 7] = largest, -largest
    text = "g (float16[t, 64] x) => (float16[t, 64] y) <float16[64, 64] w> { [n] y = MatMul(x, w) }"
    header = '<ir_version: 10, opset_import: ["" : 21]>'
    return ir.from_onnx_text(f"{header}\n{text}", initializers=[ir.tensor(weight, name="w")])


def test_a_weight_that_would_be_infinite_declines_and_no_rewrite_is_called_wrong():
    report = rewriter.apply(model(65504), "k-quant").report
    (decline,) = [d for d in report.declines if d.rule == "matmul-to-matmul-nbits"]
    assert not decline.failed and "'w' holds the largest numbers of float16" in decline.reason
    assert not report.applied


def test_one_that_is_not_is_quantized():
    assert rewriter.apply(model(30000), "k-quant").report.applied == {"matmul-to-matmul-nbits": 1}


def test_one_that_was_not_proved_is_not_written(tmp_path):
    result = rewriter.apply(model(65504), "k-quant", overrides={"parity.local": "none"})
    with pytest.raises(QuantizationError, match="they are infinite"):
        result.save(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_every_number_of_float16_is_read_as_it_is():
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(128, 512)
    for weight in (halves, np.ascontiguousarray(halves.T).T, halves[:, ::2]):
        read = np.concatenate(over_rows(weight, lambda _, chunk: chunk, 50))
        np.testing.assert_array_equal(read.view(np.uint32), weight.astype(np.float32).view(np.uint32))


def test_rows_that_are_one_block_fill_a_tile(monkeypatch):
    weight = np.random.default_rng(0).standard_normal((40, 1000)).astype(np.float32)
    context = WeightContext(WeightSpec("k-quant", 4, 0), weight.dtype)
    whole = k_quant.quantize(weight, context)
    sizes = []
    fit = rows.quantize_chunk
    monkeypatch.setattr(rows, "CHUNK", 1000)
    monkeypatch.setattr(rows, "quantize_chunk", lambda *given: sizes.append(len(given[1])) or fit(*given))
    np.testing.assert_array_equal(k_quant.quantize(weight, context).codes, whole.codes)
    assert sum(sizes) == 40 and max(sizes) >= LANES


@pytest.mark.parametrize("algorithm", ["rtn", "k-quant", "mse-search"])
@pytest.mark.parametrize(("shape", "block"), [((70, 96), 32), ((3, 40), 16), ((9, 100), 32), ((40, 50), 0)])
def test_halves_give_what_the_same_numbers_in_float32_give(algorithm, shape, block):
    """Also those that are read before: of blocks that are not whole, or fewer than a tile, or in another order."""
    halves = np.random.default_rng(0).standard_normal(shape).astype(np.float16)
    halves[1, 3], halves[2, :5] = 6e-8, 0
    context = WeightContext(WeightSpec(algorithm, 4, block, symmetric=False), halves.dtype)
    wide = ALGORITHMS[algorithm](halves.astype(np.float32), context)
    for weight in (halves, np.asfortranarray(halves)):
        found = ALGORITHMS[algorithm](weight, context)
        assert same(found, wide)
        np.testing.assert_allclose(relative_rms(weight, found), relative_rms(halves.astype(np.float32), wide), 1e-12)


@pytest.mark.parametrize("number", [np.nan, -np.nan, np.inf, -np.inf])
def test_halves_that_are_no_numbers_are_refused(number):
    halves = np.ones((64, 64), np.float16)
    halves[40, 7] = number
    with pytest.raises(QuantizationError, match="holds NaN or infinity"):
        ALGORITHMS["rtn"](halves, WeightContext(WeightSpec("rtn"), halves.dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_the_largest_scale_is_told_in_every_type(dtype):
    assert largest(np.array([[1, -3], [2, 0]], dtype)) == 3
    assert largest(np.array([], dtype)) == 0
    assert not np.isfinite(largest(np.array([1, np.nan, -2], dtype)))


def test_a_single_bit_that_differs_is_seen():
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float16)
    made = ALGORITHMS["rtn"](weight, WeightContext(WeightSpec("rtn", symmetric=False), weight.dtype))
    assert same(made, replace(made, codes=made.codes.copy()))
    for part in ("codes", "scales", "zero_points"):
        other = getattr(made, part).copy()
        other.view(np.uint8)[-1, -1] ^= 1
        assert not same(made, replace(made, **{part: other}))
    assert not same(made, replace(made, zero_points=None))
    assert not same(made, replace(made, codes=made.codes[:-1]))
