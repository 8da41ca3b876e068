import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layout_strategies import BITS, BLOCKS, assert_same, random_weight, weights

from rewriter.errors import QuantizationError
from rewriter.operators import matmul_nbits
from rewriter.operators.gather_block_quantized import TABLE, TIED, LinearAndTied
from rewriter.operators.layout.stored import Refusal
from rewriter.quantize.types import QuantizedShape


@given(weights(k=st.integers(1, 60).map(lambda quarter: 4 * quarter)))
def test_tables_come_back(q):
    v, k = q.codes.shape
    stored = TABLE.require(q.shape)
    arrays = stored.pack(q)
    assert arrays[0].shape == (v, k * q.bits // 8)
    assert_same(stored.unpack(arrays), q)


@given(v=st.integers(1, 20), blocks=st.integers(1, 5), bits=BITS, block=BLOCKS, symmetric=st.booleans())
def test_tied_tables_come_back_and_share_the_bytes_of_matmul_nbits(v, blocks, bits, block, symmetric):
    q = random_weight(v, blocks * block, bits, block, symmetric=symmetric)
    stored = TIED.require(q.shape)
    arrays = stored.pack(q)
    assert [a.shape for a in arrays[:2]] == [stored.codes, stored.scales] and stored.scales == (v, blocks, 1)
    np.testing.assert_array_equal(arrays[0], matmul_nbits.RAW.require(q.shape).pack(q)[0])
    assert_same(stored.unpack(arrays), q)


def test_two_readers_of_one_table_must_read_the_same():
    q = random_weight(3, 64, 4, 16, symmetric=False)
    both = LinearAndTied(matmul_nbits.RAW.require(q.shape), TIED.require(q.shape))
    arrays = both.pack(q)
    assert_same(both.unpack(arrays), q)
    with pytest.raises(QuantizationError, match="its two readers would not read the same"):
        both.unpack([*arrays[:3], arrays[3] ^ 1])


@pytest.mark.parametrize(
    ("k", "bits", "block", "layout", "reason"),
    [
        (64, 5, 32, TABLE, "bits is 5"),
        (64, 4, 0, TABLE, "no scale for a whole row, but for blocks of"),
        (63, 4, 32, TABLE, "does not end on a byte"),
        (80, 4, 32, TIED, "K = 80 is not divisible by the block size 32"),
    ],
)
def test_illegal_tables_have_a_reason(k, bits, block, layout, reason):
    refusal = layout.of(QuantizedShape(4, k, bits, block))
    assert isinstance(refusal, Refusal) and reason in refusal.reason
