"""GPTQ: rounding that knows what the weight's inputs were, so that errors cancel in its output.

The cost of an error e of a row is ``e H e^T``, with H the sum of ``x x^T`` over the inputs x that the weight saw.
Columns are rounded in order, block by block: a block's grid is searched as ``mse-search`` does, weighted by H's
diagonal, on what is left of it; then each column's error is made good by the columns after it, as far as H lets them
stand in for it. Then codes and scales move one at a time to where the error is least while all others stay. Each row is
held against that of ``mse-search``, and the one with less error on these inputs is taken. The fewer inputs there are,
the more H is damped: with few of them the result comes close to that of ``mse-search``, with many it has half of its
error.

The scales of mxfp4 and nvfp4 are too coarse to be moved; they stay as the search of each block finds them.

A weight whose inputs were not captured, or that no token came by, gets ``mse-search``.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rewriter.quantize import kernels, mse_search
from rewriter.quantize.blas import one_thread
from rewriter.quantize.feedback import descend, feed_forward, refit_scales
from rewriter.quantize.formats import INT
from rewriter.quantize.four_bit_floats import LEVELS, search_scales
from rewriter.quantize.hessian import Hessian, Matrix, hessian_of
from rewriter.quantize.kernels import Floats
from rewriter.quantize.rows import DTYPES, frozen, over_rows, quantize_chunk
from rewriter.quantize.types import FloatArray, QuantizedWeight, WeightContext

ROWS = 64
"""Rows of a chunk: enough for a product of matrices, few enough for all cores to have some of a small weight."""

REFITS, SWEEPS = 2, 2
"""How often codes and scales move in turn, and how many sweeps over the codes each time, and at the end."""


def quantize(weight: FloatArray, context: WeightContext) -> QuantizedWeight:
    """Quantizes an [N, K] weight by its activations [T, K]; by ``mse-search`` without them.

    Raises:
        QuantizationError: weight or activations are not finite or do not fit, or a scale overflows its dtype.
    """
    searched = mse_search.quantize(weight, context)
    if context.activations is None:
        return replace(searched, algorithm="mse-search")
    with one_thread():
        hessian = hessian_of(context.activations, context.weight, weight.shape[1])
        if hessian is None:
            return replace(searched, algorithm="mse-search")
        return _better(weight, context, hessian, searched)


def _better(weight: FloatArray, context: WeightContext, hessian: Hessian, searched: QuantizedWeight) -> QuantizedWeight:
    """Returns, of each row, what GPTQ or what the search made of it, whichever costs less."""
    codes, scales = searched.codes.copy(), searched.scales.copy()
    zeros = None if searched.zero_points is None else searched.zero_points.copy()
    signed = context.spec.bits != 3  # of which no runtime takes negative scales

    def task(first: int, chunk: Floats) -> None:
        rows = slice(first, first + len(chunk))
        ours, theirs = (_Chunk(chunk, context, hessian, searched, rows) for _ in range(2))
        # What float32 or the scales' dtype cannot hold is no number, and so not better.
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            if not ours.round_in_turn():
                return
            ours.refine()
            better = ours.costs() <= theirs.costs()
        better &= signed | (ours.scales >= 0).all(axis=1)
        codes[rows][better] = ours.codes[better]
        scales[rows][better] = ours.stored()[better]
        if zeros is not None:
            zeros[rows][better] = ours.zeros[better]

    over_rows(weight, task, ROWS)
    return replace(searched, codes=codes, scales=scales, zero_points=zeros)


class _Chunk:
    """A few rows of a weight on their way: codes [R, K], scales [R, B] and zero points [R, B], all changed in place."""

    def __init__(
        self, weight: Floats, context: WeightContext, hessian: Hessian, start: QuantizedWeight, rows: slice
    ) -> None:
        spec, k = context.spec, weight.shape[1]
        self._weight, self._hessian = weight, hessian
        self._symmetric, self._dtype = spec.symmetric, context.scale_dtype
        self._floats = spec.format != INT.name
        self._global = start.global_scale
        self._block = spec.block_size or k
        self._top = (1 << spec.bits) - 1
        self.codes = start.codes[rows].copy()
        self.scales = start.scales[rows].astype(np.float32) * np.float32(start.global_scale)
        self.zeros = np.full(self.scales.shape, (self._top + 1) // 2, np.uint8)
        if start.zero_points is not None:
            self.zeros[:] = start.zero_points[rows]

    def round_in_turn(self) -> bool:
        """Searches the grid of each block on what is left of it, rounds it, and feeds its errors forward.

        Returns:
            Whether all of it could be done: what is left may exceed what a scale can hold.
        """
        left = self._weight.copy()
        for b in range(self.scales.shape[1]):
            part = slice(b * self._block, (b + 1) * self._block)
            block = frozen(left[:, part].copy())
            if not self._search(b, block, frozen(np.diag(self._hessian.matrix)[part].astype(np.float32))):
                return False
            factor = self._hessian.factor[part]
            errors, codes = block.copy(), np.empty(block.shape, np.uint8)
            grid = (self.scales[:, b].copy(), self.zeros[:, b].copy(), self._top, self._floats)
            feed_forward(errors, np.ascontiguousarray(factor[:, part]), *grid, codes)
            left[:, part.stop :] -= errors @ factor[:, part.stop :]
            self.codes[:, part] = codes
        return True

    def _search(self, b: int, block: Floats, importance: Floats) -> bool:
        """Finds the grid of one block [R, C] by its values alone; says whether a scale can hold it."""
        codes = np.empty(block.shape, np.uint8)
        if self._floats:
            if not np.isfinite(block).all():
                return False
            self.scales[:, b] = search_scales(block, importance, self._global, self._dtype, codes)
            return True
        scales, zeros = np.empty((len(block), 1), np.float32), np.empty((len(block), 1), np.uint8)
        grid = (self._block, self._top, self._symmetric, DTYPES[self._dtype])
        end = quantize_chunk(kernels.MSE_SEARCH, block, importance, *grid, codes, scales, zeros)
        self.scales[:, b], self.zeros[:, b] = scales[:, 0], zeros[:, 0]
        return bool(end == kernels.DONE)

    def refine(self) -> None:
        """Moves codes and scales to where the error is least; scales end up as they will be stored."""
        given = (self.scales, self.zeros, self._block)
        matrix = self._hessian.matrix
        for _ in range(0 if self._floats else REFITS):
            rest = self.rest()
            slope = rest @ matrix
            descend(self.codes, *given, self._top, self._floats, matrix, rest, slope, SWEEPS)
            refit_scales(self.codes, *given, matrix, rest, slope)
        self.scales[:] = self.stored().astype(np.float32) * np.float32(self._global)
        rest = self.rest()
        descend(self.codes, *given, self._top, self._floats, matrix, rest, rest @ matrix, SWEEPS)

    def stored(self) -> FloatArray:
        """Returns the scales as they are stored, [R, B]."""
        return (self.scales / np.float32(self._global)).astype(self._dtype)

    def rest(self) -> Floats:
        """Returns what the codes leave of the weight, [R, K]."""
        k = self.codes.shape[1]
        zeros, scales = (np.repeat(a, self._block, axis=1)[:, :k] for a in (self.zeros, self.scales))
        levels = LEVELS[self.codes] if self._floats else self.codes - zeros.astype(np.float32)
        rest: Floats = self._weight - levels * scales
        return rest

    def costs(self) -> Matrix:
        """Returns the error of each row on the inputs, [R], in a unit of the row's; without what damping added."""
        _, exponents = np.frexp(np.abs(self._weight).max(axis=1, keepdims=True))
        rest = np.ldexp(self.rest(), -exponents)  # squares of the least numbers would all be 0
        costs: Matrix = np.sum((rest @ self._hessian.matrix - rest * self._hessian.added) * rest, 1, dtype=np.float64)
        return costs
