import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layout_strategies import assert_same, random_floats, random_weight

from rewriter.errors import QuantizationError
from rewriter.operators.layout.stored import Refusal
from rewriter.operators.qmoe import RAW, layout_named
from rewriter.quantize.formats import MXFP4, NVFP4
from rewriter.quantize.types import QuantizedShape


@given(
    n=st.integers(1, 30),
    blocks=st.integers(1, 5),
    bits=st.sampled_from([2, 3, 4, 8]),
    block=st.sampled_from([0, 16, 32]),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_experts_come_back(*, n, blocks, bits, block, symmetric, seed):
    k = blocks * (block or 24)
    q = random_weight(n, k, bits, block, symmetric=symmetric, seed=seed, dtype=np.float16)
    stored = RAW.require(q.shape)
    codes, scales, *zeros = stored.pack(q)
    assert codes.shape == stored.codes == (n, k * bits // 8)
    assert scales.shape == stored.scales
    assert [z.shape for z in zeros] == [] if symmetric else [stored.zero_points]
    assert_same(stored.unpack([codes, scales, *zeros]), q)


@given(
    bits=st.sampled_from([4, 8]),
    layout=st.sampled_from([layout_named(f"cutlass-sm{sm}") for sm in (80, 90)]),
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


@given(
    n=st.integers(1, 8).map(lambda pair: 2 * pair),
    blocks=st.integers(1, 4),
    own=st.sampled_from([MXFP4, NVFP4]),
    layout=st.sampled_from(["raw", "columns"]),
    seed=st.integers(0, 2**31),
)
def test_float_codes_come_back(*, n, blocks, own, layout, seed):
    q = random_floats(n, blocks * own.block, own, seed)
    stored = layout_named(layout).require(q.shape)
    arrays = stored.pack(q)
    assert [a.shape for a in arrays] == [part.shape for part in stored.parts(ir.DataType.FLOAT16)]
    assert [a.dtype for a in arrays] == [part.dtype.numpy() for part in stored.parts(ir.DataType.FLOAT16)]
    back = stored.unpack(arrays)
    assert_same(back, q)
    assert (back.format, back.global_scale) == (own.name, q.global_scale)
    np.testing.assert_array_equal(back.dequantize(), q.dequantize())


def test_columns_hold_two_outputs_to_a_byte():
    q = random_floats(4, 32, MXFP4, 0)
    codes = layout_named("columns").require(q.shape).pack(q)[0]
    np.testing.assert_array_equal(codes, (q.codes[0::2] | q.codes[1::2] << 4).T)


def test_zero_points_of_whole_rows_are_packed_along_n():
    q = random_weight(3, 8, 4, 0, symmetric=False)
    z = q.zero_points[:, 0]
    np.testing.assert_array_equal(RAW.require(q.shape).pack(q)[2], [z[0] | z[1] << 4, z[2] | 8 << 4])


@pytest.mark.parametrize(
    ("shape", "layout", "reason"),
    [
        (QuantizedShape(16, 64, 5, 32), "raw", "bits is 5"),
        (QuantizedShape(16, 64, 4, 64, format="mxfp4"), "raw", "mxfp4 has blocks of 32"),
        (QuantizedShape(16, 64, 8, 32, format="mxfp4"), "raw", "mxfp4 has 4"),
        (QuantizedShape(15, 64, 4, 32, format="mxfp4"), "columns", "a column of N = 15 codes"),
        (QuantizedShape(16, 64, 4, 32), "columns", "of float codes, not of integers"),
        (QuantizedShape(16, 64, 4, 32, format="mxfp4"), "cutlass-sm80", "of integers, not of mxfp4"),
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
