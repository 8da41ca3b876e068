"""Weights on grids: codes and scales are drawn, and the weight is made of them."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from rewriter.quantize.formats import MXFP4
from rewriter.quantize.types import QuantizedWeight


def integers(n, k, bits, block, *, symmetric, dtype, seed):
    """A weight of integers times scales, each block of which has the least and the largest code."""
    rng = np.random.default_rng(seed)
    size = block or k
    codes = rng.integers(0, 1 << bits, (n, k // size, size), dtype=np.uint8)
    codes[..., 0], codes[..., 1], codes[..., 2] = 0, (1 << bits) - 1, (1 << (bits - 1)) + 1
    scales = (rng.random((n, k // size)) * 0.1 + 0.02).astype(dtype)
    zeros = np.full((n, k // size), 1 << (bits - 1), np.uint8)
    if not symmetric:
        zeros = rng.integers(0, 1 << bits, zeros.shape, dtype=np.uint8)
    weight = QuantizedWeight(codes.reshape(n, k), scales, None if symmetric else zeros, bits, block)
    return weight.dequantize().astype(dtype), weight


def floats(n, k, own, *, dtype, seed):
    """A weight of e2m1 times scales, each block of which has the largest code."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (n, k // own.block, own.block), dtype=np.uint8)
    codes[..., 0] = 7
    powers = 2.0 ** rng.integers(-6, 2, (n, k // own.block))
    scales = powers if own is MXFP4 else powers * rng.integers(8, 16, powers.shape) / 8
    weight = QuantizedWeight(codes.reshape(n, k), scales.astype(own.scale_dtype), None, 4, own.block, format=own.name)
    return weight.dequantize().astype(dtype), weight


def under(unit, seed):
    """nvfp4 as it is made: the largest scale is the largest of e4m3, under a global scale in float32."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (6, 16, 16), dtype=np.uint8)
    codes[..., 0] = 7
    scales = (448 * 2.0 ** rng.uniform(-8, 0, (6, 16))).astype(ml_dtypes.float8_e4m3fn)
    scales[3, 4] = 448
    return QuantizedWeight(codes.reshape(6, 256), scales, None, 4, 16, format="nvfp4", global_scale=float(unit))
