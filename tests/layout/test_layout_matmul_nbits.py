import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layout_strategies import assert_same, random_weight, weights

from rewriter.errors import QuantizationError
from rewriter.operators.layout import matmul_nbits
from rewriter.quantize.types import QuantizedWeight


@given(weights())
def test_weights_come_back(q):
    n, k = q.codes.shape
    arrays = matmul_nbits.pack(q)
    b, scales, zeros = matmul_nbits.shapes(n, k, q.bits, q.block_size, q.zero_points is None)
    assert arrays.b.shape == b and arrays.scales.shape == scales
    assert (None if arrays.zero_points is None else arrays.zero_points.shape) == zeros
    assert_same(matmul_nbits.unpack(arrays, n, k, q.bits, q.block_size), q)
    flat = matmul_nbits.MatMulNBitsArrays(
        arrays.b.reshape(n, -1),
        arrays.scales.reshape(-1),
        None if arrays.zero_points is None else arrays.zero_points.reshape(-1),
    )
    assert_same(matmul_nbits.unpack(flat, n, k, q.bits, q.block_size), q)


@given(
    bits=st.sampled_from([4, 8]),
    sm=st.sampled_from([80, 90]),
    n=st.integers(1, 4),
    k=st.integers(1, 4),
    symmetric=st.booleans(),
)
def test_prepacked_weights_come_back_in_the_standard_shape(bits, sm, n, k, symmetric):
    q = random_weight(16 * n, 64 * k, bits, 64, symmetric=symmetric)
    arrays = matmul_nbits.pack(q, prepacked=sm)
    assert arrays.b.shape == matmul_nbits.shapes(16 * n, 64 * k, bits, 64, symmetric)[0]
    assert not np.array_equal(arrays.b, matmul_nbits.pack(q).b)
    assert_same(matmul_nbits.unpack(arrays, 16 * n, 64 * k, bits, 64, prepacked=sm), q)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [16, 32, 128, 256])
@pytest.mark.parametrize("k", [64, 96, 300, 260, 52])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bytes_are_those_of_the_runtimes_own_quantizer(bits, k, block, symmetric):
    pytest.importorskip("onnxruntime")
    from onnxruntime.capi import _pybind_state as runtime

    n = 7
    weight = np.random.default_rng(k).standard_normal((k, n)).astype(np.float32)
    b_shape, scales_shape, zeros_shape = matmul_nbits.shapes(n, k, bits, block, symmetric=False)
    b, scales, zeros = np.zeros(b_shape, np.uint8), np.zeros(scales_shape, np.float32), np.zeros(zeros_shape, np.uint8)
    getattr(runtime, f"quantize_matmul_{bits}bits")(b, weight, scales, zeros, block, n, k, symmetric)
    theirs = matmul_nbits.MatMulNBitsArrays(b, scales, None if symmetric else zeros)
    q = matmul_nbits.unpack(theirs, n, k, bits, block)
    ours = matmul_nbits.pack(q)
    np.testing.assert_array_equal(ours.b, b)
    np.testing.assert_array_equal(ours.scales, scales)
    if not symmetric:
        np.testing.assert_array_equal(ours.zero_points, zeros)
    # The codes were read right: they stand for the weight they came from.
    error = q.dequantize() - weight.T
    assert np.sqrt(np.mean(error**2) / np.mean(weight**2)) < {2: 0.8, 4: 0.16, 8: 0.01}[bits]


def test_odd_rows_pad_zero_points_with_the_default_and_codes_with_zero():
    codes, scales = np.full((1, 70), 15, np.uint8), np.ones((1, 3), np.float32)
    arrays = matmul_nbits.pack(QuantizedWeight(codes, scales, np.array([[1, 2, 3]], np.uint8), 4, 32))
    np.testing.assert_array_equal(arrays.zero_points, [[0x21, 0x83]])
    np.testing.assert_array_equal(arrays.b[0, 2], [0xFF] * 3 + [0] * 13)


@pytest.mark.parametrize(
    ("n", "k", "bits", "block", "prepacked", "reason"),
    [
        (16, 64, 3, 32, None, "bits is 3"),
        (16, 64, 4, 8, None, "block size 8"),
        (16, 64, 4, 48, None, "block size 48"),
        (16, 64, 4, 0, None, "block size 0"),
        (16, 96, 4, 64, 80, "not divisible by the block size 64"),
        (16, 96, 4, 32, 80, "K = 96 is not a multiple of 64"),
        (24, 64, 4, 32, 80, "N = 24"),
        (16, 64, 2, 32, 80, "bits is 2"),
    ],
)
def test_illegal_weights_have_a_reason(*, n, k, bits, block, prepacked, reason):
    assert reason in matmul_nbits.illegal(n, k, bits, block, prepacked=prepacked)
    with pytest.raises(QuantizationError, match=reason):
        matmul_nbits.pack(random_weight(n, k, bits, block), prepacked=prepacked)


def test_foreign_arrays_are_refused():
    arrays = matmul_nbits.pack(random_weight(4, 64, 4, 32, symmetric=False))
    for name, wrong in (("b", arrays.b[:2]), ("scales", arrays.scales[:2]), ("zero_points", arrays.zero_points[:2])):
        with pytest.raises(QuantizationError, match="the layout needs"):
            matmul_nbits.unpack(dataclasses.replace(arrays, **{name: wrong}), 4, 64, 4, 32)
