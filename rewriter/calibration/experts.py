"""What each expert of a block saw: the router's choice, and the inputs of the down projection computed from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rewriter.calibration.sites import ExpertSite
from rewriter.operators.moe import MOE
from rewriter.operators.reference.experts import Linear, feed_forward, mix, route
from rewriter.parity.runtime import Array, Feeds
from rewriter.tensors import View, drop_pages

Float32 = npt.NDArray[np.float32]


def choose(site: ExpertSite, logits: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    """Returns the experts that each token is sent to, [T, k], from logits [T, E] in any dtype."""
    flat = logits.reshape(-1, site.experts).astype(np.float32)
    return route(MOE.name, site.form, flat)[0].astype(np.uint16)


def down_inputs(site: ExpertSite, expert: int, x: Float32) -> Float32:
    """Returns what the down projection of one expert sees, [T, I], of the block's inputs x [T, H]."""
    seen: list[Float32] = []

    def down(_: int, h: Float32) -> Float32:
        seen.append(h)
        return h

    fc3 = None if site.fc3 is None else _linear(site.fc3, site.fc3_bias)
    feed_forward(MOE.name, site.form, _linear(site.fc1, site.fc1_bias), down, fc3)(expert, x)
    return seen[0]


def outputs(site: ExpertSite, feeds: Sequence[Feeds]) -> list[Array]:
    """Computes a block for several runs at once, one expert's weights in memory at a time.

    Args:
        site: the block.
        feeds: of each run x and logits by their names.

    Returns:
        Of each run what the block computes, as x.
    """
    given = [feed[site.x.name or ""] for feed in feeds]
    x, logits = (
        np.concatenate([feed[value.name or ""].reshape(-1, width) for feed in feeds]).astype(np.float32)
        for value, width in ((site.x, site.fc1.shape[2]), (site.logits, site.experts))
    )
    fc1, fc2 = _linear(site.fc1, site.fc1_bias), _linear(site.fc2, site.fc2_bias)
    fc3 = None if site.fc3 is None else _linear(site.fc3, site.fc3_bias)
    y = mix(x, *route(MOE.name, site.form, logits), feed_forward(MOE.name, site.form, fc1, fc2, fc3))
    ends = np.cumsum([array.size // x.shape[1] for array in given])[:-1]
    parts = zip(np.split(y, ends), given, strict=True)
    return [part.reshape(array.shape).astype(array.dtype) for part, array in parts]


def _linear(weight: View, bias: View | None) -> Linear:
    def run(expert: int, x: Float32) -> Float32:
        matrix = weight.index(0, expert)
        y = x @ matrix.numpy().astype(np.float32).T
        drop_pages(matrix)
        return y if bias is None else y + bias.index(0, expert).numpy().astype(np.float32)

    return run
