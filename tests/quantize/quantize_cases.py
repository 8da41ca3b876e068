"""Weights and contexts for the quantizer tests."""

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from rewriter.quantize import QuantizedWeight, WeightContext, WeightSpec

DTYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


def context(algorithm, bits=4, block=32, symmetric=False, dtype=np.float32, **more):
    """``dtype`` is that of the scales."""
    return WeightContext(WeightSpec(algorithm, bits, block, symmetric), np.dtype(dtype), weight="layer.0.down", **more)


def distributions(shape, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "normal": rng.standard_normal(shape, np.float32),
        "student-t": rng.standard_t(4, shape).astype(np.float32),
        "shifted": rng.standard_normal(shape, np.float32) + np.float32(1),
    }


def awkward(k, dtype=np.float32, seed=0):
    """[9, k]: random, zeros, constants, positive, negative, one outlier, ties, tiny, mixed magnitudes."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((9, k))
    weight[1] = 0
    weight[2] = 0.3
    weight[3] = np.abs(weight[3])
    weight[4] = -np.abs(weight[4])
    weight[5] = 0
    weight[5, k // 2] = 7
    weight[6] = np.rint(weight[6] * 8)
    weight[7] *= 1e-6
    weight[8] *= 10.0 ** rng.integers(-3, 4, k)
    return weight.astype(dtype)


def block_errors(weight, quantized: QuantizedWeight, importance=None):
    """Returns [N, B] float64: the weighted squared error of every block."""
    n, k = weight.shape
    blocks = quantized.scales.shape[1]
    block = quantized.block_size or k
    squares = np.zeros((n, blocks * block))
    zeros = 1 << (quantized.bits - 1) if quantized.zero_points is None else quantized.zero_points
    zeros = np.repeat(np.broadcast_to(zeros, quantized.scales.shape), block, axis=1)[:, :k].astype(np.float64)
    scales = np.repeat(quantized.scales.astype(np.float64), block, axis=1)[:, :k]
    error = (quantized.codes - zeros) * scales - weight.astype(np.float64)
    squares[:, :k] = error**2 * (1 if importance is None else importance)
    return squares.reshape(n, blocks, block).sum(axis=2)


def relative(weight, quantized):
    return float(np.sqrt(block_errors(weight, quantized).sum() / np.sum(weight.astype(np.float64) ** 2)))


def ort_rtn(weight, bits, block, symmetric):
    """ONNX Runtime's own codes [N, K], scales and zero points [N, B]."""
    from onnxruntime.capi import _pybind_state as ort

    n, k = weight.shape
    blocks = -(-k // block)
    packed = np.zeros((n, blocks, block * bits // 8), np.uint8)
    scales = np.zeros(n * blocks, weight.dtype)
    zeros = np.zeros(n * -(-blocks * bits // 8), np.uint8)
    run = getattr(ort, f"quantize_matmul_{bits}bits")
    run(packed, np.ascontiguousarray(weight.T), scales, zeros, block, n, k, symmetric)

    def unpack(data, width):
        fields = data.reshape(n, -1)[..., None] >> np.arange(0, 8, bits, dtype=np.uint8)
        return (fields & ((1 << bits) - 1)).astype(np.uint8).reshape(n, -1)[:, :width]

    zero_points = None if symmetric else unpack(zeros, blocks)
    return QuantizedWeight(unpack(packed, k), scales.reshape(n, blocks), zero_points, bits, block)


def ort_k_quant(weight, bits, block):
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

    codes, scales, zeros = quant_tensor_k_quant_cpu(weight, bits, block)
    shape = (len(weight), -1)
    scales, zeros = scales.astype(np.float32).reshape(shape), zeros.reshape(shape)
    return QuantizedWeight(codes.reshape(weight.shape).astype(np.uint8), scales, zeros, bits, block)


@st.composite
def weights(draw):
    """A finite [N, K] weight of any supported dtype and magnitude, with rows of every awkward kind, in any strides."""
    dtype = draw(st.sampled_from(DTYPES))
    k = draw(st.integers(1, 80))
    weight = awkward(k, np.float64, draw(st.integers(0, 99)))
    info = ml_dtypes.finfo(dtype)
    exponent = draw(st.integers(-4, 3) if dtype == np.float16 else st.integers(-42, 37))
    weight = weight / np.abs(weight).max() * min(10.0**exponent, float(info.max))
    weight = weight.astype(dtype)
    form = draw(st.sampled_from(["plain", "transposed", "strided"]))
    if form == "transposed":
        weight = np.ascontiguousarray(weight.T).T
    elif form == "strided":
        weight = np.repeat(np.repeat(weight, 2, axis=0), 3, axis=1)[::2, ::3]
    weight.flags.writeable = False
    return weight
