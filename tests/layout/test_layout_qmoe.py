import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layout_strategies import assert_same, random_weight

from rewriter.errors import QuantizationError
from rewriter.operators.layout.stored import Refusal
from rewriter.operators.qmoe import LAYOUTS, RAW, layout_named
from rewriter.quantize.types import QuantizedShape


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
    stored = RAW.require(q.shape)
    codes, scales, *zeros = stored.pack(q)
    assert codes.shape == stored.codes == (n, k * bits // 8)
    assert scales.shape == stored.scales
    assert [z.shape for z in zeros] == [] if symmetric else [stored.zero_points]
    assert_same(stored.unpack([codes, scales, *zeros]), q)


@given(
    bits=st.sampled_from([4, 8]),
    layout=st.sampled_from([layout for layout in LAYOUTS if layout is not RAW]),
    block=st.sampled_from([0, 32]),
    n=st.integers(1, 5),
    k=st.integers(1, 5),
    symmetric=st.booleans(),
)
def test_raw_to_prepacked_to_raw(*, bits, layout, block, n, k, symmetric):
    q = random_weight(16 * n, 64 * k, bits, block, symmetric=symmetric)
    raw, packed = RAW.require(q.shape), layout.require(q.shape)
    arrays = packed.pack(raw.unpack(raw.pack(q)))
    assert arrays[0].shape == packed.codes == (64 * k, 2 * n * bits)
    np.testing.assert_array_equal(raw.pack(packed.unpack(arrays))[0], raw.pack(q)[0])


def test_zero_points_of_whole_rows_are_packed_along_n():
    q = random_weight(3, 8, 4, 0, symmetric=False)
    z = q.zero_points[:, 0]
    np.testing.assert_array_equal(RAW.require(q.shape).pack(q)[2], [z[0] | z[1] << 4, z[2] | 8 << 4])


@pytest.mark.parametrize(
    ("shape", "layout", "reason"),
    [
        (QuantizedShape(16, 64, 5, 32), "raw", "bits is 5"),
        (QuantizedShape(16, 64, 4, 24), "raw", "block size 24"),
        (QuantizedShape(16, 2880, 4, 128), "raw", "K = 2880 is not divisible by the block size 128"),
        (QuantizedShape(16, 63, 4, 0), "raw", "does not end on a byte"),
        (QuantizedShape(16, 96, 4, 32), "cutlass-sm80", "K = 96 is not a multiple of 64"),
    ],
)
def test_illegal_projections_have_a_reason(*, shape, layout, reason):
    refusal = layout_named(layout).of(shape)
    assert isinstance(refusal, Refusal) and reason in refusal.reason
    with pytest.raises(QuantizationError, match=reason):
        layout_named(layout).require(shape)


def test_another_weight_than_the_stored_one_is_refused():
    q = random_weight(4, 64, 4, 32)
    with pytest.raises(QuantizationError, match="the layout holds"):
        RAW.require(QuantizedShape(4, 64, 4, 16)).pack(q)


def test_an_unknown_layout_name_gets_the_nearest():
    with pytest.raises(QuantizationError, match="did you mean 'cutlass-sm80'"):
        layout_named("cutlass-sm8")
