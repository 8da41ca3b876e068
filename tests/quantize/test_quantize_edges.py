"""Weights at the edge of their type."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

import rewriter
from rewriter.errors import QuantizationError
from rewriter.quantize import WeightContext, WeightSpec, k_quant, rows
from rewriter.quantize.lanes import LANES
from rewriter.quantize.rows import over_rows


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
    weight = np.random.default_rng(0).standard_normal((40, 1000)).astype(np.float16)
    context = WeightContext(WeightSpec("k-quant", 4, 0), weight.dtype)
    whole = k_quant.quantize(weight, context)
    sizes = []
    fit = rows.quantize_chunk
    monkeypatch.setattr(rows, "CHUNK", 1000)
    monkeypatch.setattr(rows, "quantize_chunk", lambda *given: sizes.append(len(given[1])) or fit(*given))
    np.testing.assert_array_equal(k_quant.quantize(weight, context).codes, whole.codes)
    assert sum(sizes) == 40 and max(sizes) >= LANES
