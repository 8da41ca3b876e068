"""Hypothesis strategies for quantized weights, and what must come back from a layout."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from rewriter.quantize.types import QuantizedWeight

ROWS, COLUMNS = st.integers(1, 20), st.integers(1, 300)
BITS = st.sampled_from([2, 4, 8])
BLOCKS = st.sampled_from([16, 32, 64, 128])
SCALE_DTYPES = st.sampled_from([np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)])


def random_weight(n, k, bits, block, *, symmetric=True, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    blocks = -(-k // block) if block else 1
    return QuantizedWeight(
        codes=rng.integers(0, 1 << bits, (n, k), dtype=np.uint8),
        scales=rng.standard_normal((n, blocks)).astype(dtype),
        zero_points=None if symmetric else rng.integers(0, 1 << bits, (n, blocks), dtype=np.uint8),
        bits=bits,
        block_size=block,
    )


def random_floats(n, k, own, seed):
    """A weight in mxfp4 or nvfp4."""
    rng = np.random.default_rng(seed)
    powers = 2.0 ** rng.integers(-6, 6, (n, k // own.block))
    return QuantizedWeight(
        codes=rng.integers(0, 16, (n, k), dtype=np.uint8),
        scales=powers.astype(own.scale_dtype),
        zero_points=None,
        bits=4,
        block_size=own.block,
        format=own.name,
        global_scale=float(2.0 ** rng.integers(-3, 3)),
    )


@st.composite
def weights(draw, n=ROWS, k=COLUMNS, bits=BITS, block=BLOCKS):
    return random_weight(
        draw(n),
        draw(k),
        draw(bits),
        draw(block),
        symmetric=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
        dtype=draw(SCALE_DTYPES),
    )


def assert_same(back, q):
    assert (back.bits, back.block_size) == (q.bits, q.block_size)
    np.testing.assert_array_equal(back.codes, q.codes)
    assert back.scales.dtype == q.scales.dtype
    np.testing.assert_array_equal(back.scales, q.scales)
    assert (back.zero_points is None) == (q.zero_points is None)
    if q.zero_points is not None:
        np.testing.assert_array_equal(back.zero_points, q.zero_points)
