"""Models whose weights were trained in few bits and widened: codes and scales drawn first, weights made of them."""

from __future__ import annotations

import numpy as np
from moe_models import SWIGLU, initializers_of, moe_model, nodes_of, tensor

from rewriter.quantize.formats import E2M1, MXFP4, NVFP4

E, H, I = 4, 128, 64  # noqa: E741
GPT_OSS = SWIGLU | {"swiglu_fusion": 1, "k": 2, "normalize_routing_weights": 1}
VALUES = np.array(E2M1)


def born(grid, n, k, dtype, seed):
    """A stack [E, N, K] on a grid, with the codes and the scales that made it."""
    rng = np.random.default_rng(seed)
    if isinstance(grid, str):
        own = {"mxfp4": MXFP4, "nvfp4": NVFP4}[grid]
        codes = rng.integers(0, 16, (E, n, k // own.block, own.block), dtype=np.uint8)
        codes[..., 0] = 7  # the scale could be another one in a block without its largest numbers
        powers = 2.0 ** rng.integers(-8, -4, (E, n, k // own.block))
        scales = powers if grid == "mxfp4" else powers * rng.integers(8, 16, powers.shape) / 8
        return (VALUES[codes] * scales[..., None]).reshape(E, n, k).astype(dtype), codes.reshape(E, n, k), scales
    half = 1 << (grid - 1)
    codes = rng.integers(0, 2 * half, (E, n, k // 32, 32), dtype=np.uint8)
    codes[..., 0], codes[..., 1], codes[..., 2] = 0, 2 * half - 1, half + 1
    scales = (rng.random((E, n, k // 32)) * 0.02 + 0.01).astype(dtype)
    weight = ((codes - float(half)) * scales.astype(np.float64)[..., None]).astype(np.float32)
    return weight.reshape(E, n, k).astype(dtype), codes.reshape(E, n, k), scales


def with_stacks(fc1, fc2, attributes=GPT_OSS):
    """An MoE with biases and these weights, in their dtype."""
    model = moe_model(attributes, dtype=fc1.dtype, hidden=H, inter=I, experts=E)
    arrays, node = initializers_of(model), nodes_of(model, "MoE")[0]
    arrays |= {node.input[2]: fc1, node.input[4]: fc2}
    del model.graph.initializer[:]
    model.graph.initializer.extend(tensor(array, name) for name, array in arrays.items())
    return model
