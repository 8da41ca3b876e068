import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layout_strategies import assert_same, random_weight

from rewriter.errors import QuantizationError
from rewriter.operators.layout import cutlass, qmoe


@given(
    n=st.integers(1, 30),
    blocks=st.integers(1, 5),
    bits=st.sampled_from([2, 4, 8]),
    block=st.sampled_from([0, 16, 32]),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_experts_come_back(*, n, blocks, bits, block, symmetric, seed):
    k = blocks * (block or 12)
    q = random_weight(n, k, bits, block, symmetric=symmetric, seed=seed, dtype=np.float16)
    arrays = qmoe.pack(q)
    weight, scales, zeros = qmoe.shapes(3, n, k, bits, block, symmetric=symmetric)
    assert (3, *arrays.weight.shape) == weight == (3, n, k * bits // 8)
    assert (3, *arrays.scales.shape) == scales
    assert (None if symmetric else (3, *arrays.zero_points.shape)) == zeros
    assert_same(qmoe.unpack(arrays, n, k, bits, block), q)


@given(
    bits=st.sampled_from([4, 8]),
    sm=st.sampled_from([80, 90]),
    block=st.sampled_from([0, 32]),
    n=st.integers(1, 5),
    k=st.integers(1, 5),
    symmetric=st.booleans(),
)
def test_raw_to_prepacked_to_raw(*, bits, sm, block, n, k, symmetric):
    n, k = 16 * n, 64 * k
    raw = qmoe.pack(random_weight(n, k, bits, block, symmetric=symmetric))
    packed = qmoe.pack(qmoe.unpack(raw, n, k, bits, block), prepacked=sm)
    assert (1, *packed.weight.shape) == qmoe.shapes(1, n, k, bits, block, symmetric=symmetric, prepacked=sm)[0]
    back = qmoe.pack(qmoe.unpack(packed, n, k, bits, block, prepacked=sm))
    np.testing.assert_array_equal(back.weight, raw.weight)


def test_zero_points_of_whole_rows_are_packed_along_n():
    q = random_weight(3, 8, 4, 0, symmetric=False)
    z = q.zero_points[:, 0]
    np.testing.assert_array_equal(qmoe.pack(q).zero_points, [z[0] | z[1] << 4, z[2] | 8 << 4])


@pytest.mark.parametrize(
    ("n", "k", "bits", "block", "prepacked", "reason"),
    [
        (16, 64, 3, 32, None, "bits is 3"),
        (16, 64, 4, 24, None, "block size 24"),
        (16, 2880, 4, 128, None, "K = 2880 is not divisible by the block size 128"),
        (16, 63, 4, 0, None, "does not end on a byte"),
        (16, 96, 4, 32, 80, "K = 96 is not a multiple of 64"),
    ],
)
def test_illegal_projections_have_a_reason(*, n, k, bits, block, prepacked, reason):
    assert reason in qmoe.illegal(n, k, bits, block, prepacked=prepacked)
    with pytest.raises(QuantizationError, match=reason):
        qmoe.shapes(4, n, k, bits, block, symmetric=True, prepacked=prepacked)


@pytest.mark.parametrize("prepacked", [None, *cutlass.ARCHITECTURES])
def test_layout_names_come_back(prepacked):
    assert qmoe.layout_of(qmoe.layout_name(prepacked)) == prepacked


def test_an_unknown_layout_name_gets_the_nearest():
    with pytest.raises(QuantizationError, match="did you mean 'cutlass-sm80'"):
        qmoe.layout_of("cutlass-sm8")
