"""The reference MatMulNBits and GatherBlockQuantized against ONNX Runtime's CPU provider."""

import itertools

import numpy as np
import pytest
from reference_models import assert_agree, random_projection, reference

from rewriter.errors import ModelError, TargetError
from rewriter.operators import matmul_nbits
from rewriter.operators.gather_block_quantized import TABLE, TIED

DTYPES = [np.float32, np.float16]


# MatMulNBits


def matmul_slots(q, *, bias=False, float_zeros=False):
    rng = np.random.default_rng(0)
    dtype = q.scales.dtype
    b, scales, *packed = matmul_nbits.RAW.require(q.shape).pack(q)
    zeros = (q.zero_points + 0.25).astype(dtype) if float_zeros else next(iter(packed), None)
    return {
        "x": rng.standard_normal((2, 3, q.codes.shape[1])).astype(dtype),
        "b": b,
        "s": scales,
        "zeros": zeros,
        "g_idx": None,
        "bias": rng.standard_normal(q.codes.shape[0]).astype(dtype) if bias else None,
    }


def matmul_attributes(q):
    n, k = q.codes.shape
    return {"K": k, "N": n, "bits": q.bits, "block_size": q.block_size}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_matmul_nbits(bits, block, symmetric, dtype):
    rng = np.random.default_rng(0)
    for k, bias in itertools.product((64, 69, 300), (False, True)):
        q = random_projection(24, block * -(-k // block), bits, block, symmetric=symmetric, dtype=dtype, seed=0)
        q = type(q)(rng.integers(0, 1 << bits, (24, k), dtype=np.uint8), q.scales, q.zero_points, bits, block)
        assert_agree("MatMulNBits", matmul_slots(q, bias=bias), ["x"], matmul_attributes(q))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 4])
def test_matmul_nbits_with_float_zero_points(bits, dtype):
    q = random_projection(24, 96, bits, 32, symmetric=False, dtype=dtype, seed=0)
    assert_agree("MatMulNBits", matmul_slots(q, float_zeros=True), ["x"], matmul_attributes(q))


@pytest.mark.parametrize("value", [1, 2])
@pytest.mark.parametrize("bits", [4, 8])
def test_prepacked_matmul_nbits_is_the_same_function(bits, value):
    q = random_projection(32, 128, bits, 64, symmetric=False, dtype=np.float32, seed=0)
    slots = matmul_slots(q)
    expected = reference("MatMulNBits", slots, ["x"], matmul_attributes(q))
    packed = slots | {"b": matmul_nbits.LAYOUTS[value].require(q.shape).pack(q)[0]}
    got = reference("MatMulNBits", packed, ["x"], matmul_attributes(q) | {"weight_prepacked": value})
    np.testing.assert_array_equal(got, expected)


# GatherBlockQuantized


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gather_block_quantized(bits, symmetric, tied, dtype):
    q = random_projection(11, 96, bits, 32, symmetric=symmetric, dtype=dtype, seed=0)
    data, scales, *zeros = (TIED if tied else TABLE).require(q.shape).pack(q)
    attributes = {"bits": bits, "block_size": 32, "quantize_axis": 2 if tied else 1}
    for rows in (np.array([[0, 3], [10, -1]]), np.array(4, np.int32), np.array([20, -30, 1])):
        slots = {"data": data, "rows": rows, "scales": scales, "zeros": next(iter(zeros), None)}
        assert_agree("GatherBlockQuantized", slots, ["rows"], attributes)


def test_gather_block_quantized_of_an_expert_stack():
    experts = [random_projection(6, 64, 4, 32, symmetric=False, dtype=np.float32, seed=e) for e in range(5)]
    stored = TABLE.require(experts[0].shape)
    data, scales, zeros = (np.stack(parts) for parts in zip(*map(stored.pack, experts), strict=True))
    slots = {"data": data, "rows": np.array([[3, 0], [-1, 3]]), "scales": scales, "zeros": zeros}
    assert_agree("GatherBlockQuantized", slots, ["rows"], {"bits": 4, "block_size": 32, "quantize_axis": -1})


def test_matmul_nbits_and_gather_refuse():
    q = random_projection(8, 64, 4, 32, symmetric=True, dtype=np.float32, seed=0)
    slots, attributes = matmul_slots(q), matmul_attributes(q)
    with pytest.raises(TargetError, match="g_idx"):
        reference("MatMulNBits", slots | {"g_idx": np.zeros(64, np.int32)}, ["x"], attributes)
    with pytest.raises(TargetError, match="bits is 3"):
        reference("MatMulNBits", slots, ["x"], attributes | {"bits": 3})
    with pytest.raises(TargetError, match="weight_prepacked=3"):
        reference("MatMulNBits", slots, ["x"], attributes | {"weight_prepacked": 3})
    with pytest.raises(ModelError, match="last dimension must be K"):
        reference("MatMulNBits", slots, ["x"], attributes | {"K": 32})
    data, scales = TABLE.require(q.shape).pack(q)
    table = {"data": data, "rows": np.array([0]), "scales": scales}
    with pytest.raises(TargetError, match="gather_axis=1"):
        reference("GatherBlockQuantized", table, ["rows"], {"block_size": 32, "gather_axis": 1, "quantize_axis": 0})
    with pytest.raises(ModelError, match="scales has shape"):
        reference("GatherBlockQuantized", table, ["rows"], {"block_size": 16})
