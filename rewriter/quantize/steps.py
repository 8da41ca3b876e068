"""What the searches over scales try: plain numbers, which the compiled kernels are given."""

from __future__ import annotations

import functools

import numpy as np

from rewriter.quantize.kernels import EIGHT_BITS, K_QUANT, POSITIVE, Floats, Tried


@functools.cache
def steps(method: int, top: int, symmetric: bool) -> Tried:
    """Returns by what a search divides the scale that it starts from, then the best of these, and the best of all."""

    def geometric(first: float, last: float, count: int) -> Floats:
        return np.geomspace(first, last, count).astype(np.float32)

    if method == K_QUANT:
        # In quarters of a level around the plain grid; then as far as a block may be clipped.
        lines = (1 + np.arange(-7, 8, 2) / (4.0 * (top + 1) if symmetric else 8.0 * top)).astype(np.float32)
        clip = (0.985, 1.03, 6) if top == EIGHT_BITS else (0.96, 1.16, 4) if top > POSITIVE else (0.94, 1.4, 6)
        return lines, lines, geometric(*clip)
    if top == EIGHT_BITS:  # which fit best close to the full range, and where each step meets codes of its own
        return geometric(0.93, 1.4, 12), geometric(0.94, 1.05, 24), geometric(0.997, 1.003, 7)
    # From a little wider than the block, where another phase of the grid may fit, to a seventh, for outliers; then the
    # more levels, the closer to it.
    coarse = geometric(0.94, 6.7, 7)
    if top > POSITIVE:
        return coarse, geometric(0.82, 1.23, 8), geometric(0.95, 1.05, 7)
    return coarse, geometric(0.74, 1.35, 6), geometric(0.92, 1.09, 5)
