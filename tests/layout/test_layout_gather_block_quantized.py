import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layout_strategies import BITS, BLOCKS, assert_same, random_weight, weights

from rewriter.errors import QuantizationError
from rewriter.operators.layout import gather_block_quantized, matmul_nbits


@given(weights(k=st.integers(1, 60).map(lambda quarter: 4 * quarter)))
def test_tables_come_back(q):
    v, k = q.codes.shape
    arrays = gather_block_quantized.pack(q)
    assert arrays.data.shape == (v, k * q.bits // 8)
    assert_same(gather_block_quantized.unpack(arrays, v, k, q.bits, q.block_size), q)


@given(v=st.integers(1, 20), blocks=st.integers(1, 5), bits=BITS, block=BLOCKS, symmetric=st.booleans())
def test_tied_tables_come_back_and_share_the_bytes_of_matmul_nbits(v, blocks, bits, block, symmetric):
    q = random_weight(v, blocks * block, bits, block, symmetric=symmetric)
    arrays = gather_block_quantized.pack(q, tied=True)
    shapes = gather_block_quantized.shapes((v,), blocks * block, bits, block, symmetric=symmetric, tied=True)
    assert (arrays.data.shape, arrays.scales.shape) == shapes[:2]
    np.testing.assert_array_equal(arrays.data, matmul_nbits.pack(q).b)
    assert_same(gather_block_quantized.unpack(arrays, v, blocks * block, bits, block, tied=True), q)


def test_shapes_of_an_expert_stack():
    shapes = gather_block_quantized.shapes((4, 6), 96, 2, 32, symmetric=False)
    assert shapes == ((4, 6, 24), (4, 6, 3), (4, 6, 1))


@pytest.mark.parametrize(
    ("k", "bits", "block", "tied", "reason"),
    [
        (64, 5, 32, False, "bits is 5"),
        (64, 4, 0, False, "block size 0"),
        (63, 4, 32, False, "does not end on a byte"),
        (80, 4, 32, True, "K = 80 is not divisible by the block size 32"),
    ],
)
def test_illegal_tables_have_a_reason(k, bits, block, tied, reason):
    assert reason in gather_block_quantized.illegal(k, bits, block, tied=tied)
    with pytest.raises(QuantizationError, match=reason):
        gather_block_quantized.pack(random_weight(4, k, bits, block), tied=tied)
