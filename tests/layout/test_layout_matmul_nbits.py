import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layout_strategies import assert_same, random_weight, weights

from rewriter.errors import QuantizationError
from rewriter.operators.layout.stored import Refusal
from rewriter.operators.matmul_nbits import LAYOUTS, RAW
from rewriter.quantize.types import QuantizedShape, QuantizedWeight


@given(weights())
def test_weights_come_back(q):
    n, _ = q.codes.shape
    stored = RAW.require(q.shape)
    b, scales, *zeros = stored.pack(q)
    assert b.shape == stored.codes and scales.shape == stored.scales
    assert [z.shape for z in zeros] == ([] if stored.zero_points is None else [stored.zero_points])
    assert_same(stored.unpack([b, scales, *zeros]), q)
    assert_same(stored.unpack([b.reshape(n, -1), scales.reshape(-1), *(z.reshape(-1) for z in zeros)]), q)


@given(
    bits=st.sampled_from([4, 8]),
    layout=st.sampled_from(LAYOUTS[1:]),
    n=st.integers(1, 4),
    k=st.integers(1, 4),
    symmetric=st.booleans(),
)
def test_prepacked_weights_come_back_in_the_standard_shape(bits, layout, n, k, symmetric):
    q = random_weight(16 * n, 64 * k, bits, 64, symmetric=symmetric)
    raw, stored = RAW.require(q.shape), layout.require(q.shape)
    arrays = stored.pack(q)
    assert arrays[0].shape == raw.codes
    assert not np.array_equal(arrays[0], raw.pack(q)[0])
    assert_same(stored.unpack(arrays), q)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [16, 32, 128, 256])
@pytest.mark.parametrize("k", [64, 96, 300, 260, 52])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bytes_are_those_of_the_runtimes_own_quantizer(bits, k, block, symmetric):
    pytest.importorskip("onnxruntime")
    from onnxruntime.capi import _pybind_state as runtime

    n = 7
    weight = np.random.default_rng(k).standard_normal((k, n)).astype(np.float32)
    stored = RAW.require(QuantizedShape(n, k, bits, block, symmetric=False))
    b, scales = np.zeros(stored.codes, np.uint8), np.zeros(stored.scales, np.float32)
    zeros = np.zeros(stored.zero_points, np.uint8)
    getattr(runtime, f"quantize_matmul_{bits}bits")(b, weight, scales, zeros, block, n, k, symmetric)
    stored = RAW.require(QuantizedShape(n, k, bits, block, symmetric))
    theirs = [b, scales] if symmetric else [b, scales, zeros]
    q = stored.unpack(theirs)
    for ours, own in zip(stored.pack(q), theirs, strict=True):
        np.testing.assert_array_equal(ours, own)
    # The codes were read right: they stand for the weight they came from.
    error = q.dequantize() - weight.T
    assert np.sqrt(np.mean(error**2) / np.mean(weight**2)) < {2: 0.8, 4: 0.16, 8: 0.01}[bits]


def test_odd_rows_pad_zero_points_with_the_default_and_codes_with_zero():
    codes, scales = np.full((1, 70), 15, np.uint8), np.ones((1, 3), np.float32)
    q = QuantizedWeight(codes, scales, np.array([[1, 2, 3]], np.uint8), 4, 32)
    b, _, zeros = RAW.require(q.shape).pack(q)
    np.testing.assert_array_equal(zeros, [[0x21, 0x83]])
    np.testing.assert_array_equal(b[0, 2], [0xFF] * 3 + [0] * 13)


@pytest.mark.parametrize(
    ("shape", "layout", "reason"),
    [
        (QuantizedShape(16, 64, 3, 32), 0, "bits is 3"),
        (QuantizedShape(16, 64, 4, 8), 0, "block size 8"),
        (QuantizedShape(16, 64, 4, 48), 0, "block size 48"),
        (QuantizedShape(16, 64, 4, 0), 0, "no scale for a whole row, but for blocks of"),
        (QuantizedShape(16, 96, 4, 64), 1, "not divisible by the block size 64"),
        (QuantizedShape(16, 96, 4, 32), 1, "K = 96 is not a multiple of 64"),
        (QuantizedShape(24, 64, 4, 32), 1, "N = 24"),
        (QuantizedShape(16, 64, 2, 32), 1, "bits is 2"),
    ],
)
def test_illegal_weights_have_a_reason(*, shape, layout, reason):
    refusal = LAYOUTS[layout].of(shape)
    assert isinstance(refusal, Refusal) and reason in refusal.reason
    with pytest.raises(QuantizationError, match=reason):
        LAYOUTS[layout].require(shape)


def test_foreign_arrays_are_refused():
    q = random_weight(4, 64, 4, 32, symmetric=False)
    stored = RAW.require(q.shape)
    arrays = stored.pack(q)
    for wrong in range(3):
        with pytest.raises(QuantizationError, match="the layout needs"):
            stored.unpack([a[:2] if i == wrong else a for i, a in enumerate(arrays)])
