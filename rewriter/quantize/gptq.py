"""GPTQ: rounding that knows what the weight's inputs were, so that errors cancel in its output.

The cost of an error e of a row is ``e H e^T``, with H the sum of ``x x^T`` over the inputs x that the weight saw.
Columns are rounded in order, block by block: a block's grid is searched as ``mse-search`` does, weighted by H's
diagonal, on what is left of it; then each column's error is made good by the columns after it, as far as H lets them
stand in for it. Then codes and scales move one at a time to where the error is least while all others stay. Each row is
held against that of ``mse-search``, and the one with less error on these inputs is taken. The fewer inputs there are,
the more H is damped: with few of them the result comes close to that of ``mse-search``, with many it has half of its
error.

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
from rewriter.quantize.hessian import Hessian, Matrix
from rewriter.quantize.kernels import Codes, Floats
from rewriter.quantize.rows import DTYPES, empty, over_rows
from rewriter.quantize.types import FloatArray, QuantizedWeight, WeightContext

ROWS = 64
"""Rows of a chunk: enough for a product of matrices, few enough for all cores to have some of a small weight."""

REFITS, SWEEPS = 2, 2
"""How often codes and scales move in turn, and how many sweeps over the codes each time, and at the end."""


def quantize(weight: FloatArray, context: WeightContext) -> QuantizedWeight:
    """Quantizes an [N, K] weight by its activations [T, K]; by ``mse-search`` without them, and to float codes.

    Raises:
        QuantizationError: weight or activations are not finite or do not fit, or a scale overflows its dtype.
    """
    if context.activations is None or context.spec.format != INT.name:
        return replace(mse_search.quantize(weight, context), algorithm="mse-search")
    searched = mse_search.quantize(weight, context)
    with one_thread():
        hessian = Hessian.of(context.activations(), context.weight, weight.shape[1])
        if hessian is None:
            return replace(searched, algorithm="mse-search")
        return _better(weight, context, hessian, searched)


def _better(weight: FloatArray, context: WeightContext, hessian: Hessian, searched: QuantizedWeight) -> QuantizedWeight:
    """Returns, of each row, what GPTQ or what the search made of it, whichever costs less."""
    spec = context.spec
    codes, scales, zeros = empty(weight, context)

    def task(first: int, chunk: Floats) -> None:
        rows = slice(first, first + len(chunk))
        ours = _Chunk(chunk, context, hessian)
        others = None if searched.zero_points is None else searched.zero_points[rows]
        theirs = _Chunk(chunk, context, hessian, searched.codes[rows], searched.scales[rows], others)
        # What float32 or the scales' dtype cannot hold is no number, and so not better.
        with np.errstate(over="ignore", invalid="ignore"):
            found = ours.round_in_turn()
            if found:
                ours.refine()
            better = (found & (ours.costs() <= theirs.costs()))[:, None]
        codes[rows] = np.where(better, ours.codes, theirs.codes)
        scales[rows] = np.where(better, ours.scales, theirs.scales)
        zeros[rows] = np.where(better, ours.zeros, theirs.zeros)

    over_rows(weight, task, ROWS)
    return QuantizedWeight(codes, scales, None if spec.symmetric else zeros, spec.bits, spec.block_size)


class _Chunk:
    """A few rows of a weight on their way: codes [R, K], scales [R, B] and zero points [R, B], all changed in place."""

    def __init__(
        self,
        weight: Floats,
        context: WeightContext,
        hessian: Hessian,
        codes: Codes | None = None,
        scales: FloatArray | None = None,
        zeros: Codes | None = None,
    ) -> None:
        n, k = weight.shape
        spec = context.spec
        self._weight = weight
        self._spec = spec
        self._dtype = context.scale_dtype
        self._hessian = hessian
        self._block = spec.block_size or k
        self._top = (1 << spec.bits) - 1
        half = (self._top + 1) // 2
        shape = (n, -(-k // self._block))
        self.codes = np.zeros((n, k), np.uint8) if codes is None else codes
        self.scales = np.zeros(shape, np.float32) if scales is None else scales.astype(np.float32)
        self.zeros = np.full(shape, half, np.uint8) if zeros is None else zeros

    def round_in_turn(self) -> bool:
        """Searches the grid of each block on what is left of it, rounds it, and feeds its errors forward.

        Returns:
            Whether all of it could be done: what is left may exceed what a scale can hold.
        """
        left = self._weight.copy()
        diagonal = np.diag(self._hessian.matrix)
        for b in range(self.scales.shape[1]):
            part = slice(b * self._block, (b + 1) * self._block)
            block = _frozen(left[:, part])
            codes = np.empty(block.shape, np.uint8)
            scales, zeros = np.empty((len(block), 1), np.float32), np.empty((len(block), 1), np.uint8)
            end = kernels.quantize(
                block,
                _frozen(diagonal[part]),
                kernels.MSE_SEARCH,
                self._block,
                self._top,
                self._spec.symmetric,
                DTYPES[self._dtype],
                codes,
                scales,
                zeros,
            )
            if end != kernels.DONE:
                return False
            factor = self._hessian.factor[part]
            errors = block.copy()
            feed_forward(errors, np.ascontiguousarray(factor[:, part]), scales[:, 0], zeros[:, 0], self._top, codes)
            left[:, part.stop :] -= errors @ factor[:, part.stop :]
            self.codes[:, part], self.scales[:, b], self.zeros[:, b] = codes, scales[:, 0], zeros[:, 0]
        return True

    def refine(self) -> None:
        """Moves codes and scales to where the error is least; scales end up as they will be stored."""
        given = (self.scales, self.zeros, self._block)
        matrix = self._hessian.matrix
        for _ in range(REFITS):
            rest = self.rest()
            slope = rest @ matrix
            descend(self.codes, *given, self._top, matrix, rest, slope, SWEEPS)
            refit_scales(self.codes, *given, matrix, rest, slope)
        self.scales[:] = self.scales.astype(self._dtype)
        rest = self.rest()
        descend(self.codes, *given, self._top, matrix, rest, rest @ matrix, SWEEPS)

    def rest(self) -> Floats:
        """Returns what the codes leave of the weight, [R, K]."""
        k = self.codes.shape[1]
        zeros, scales = (np.repeat(a, self._block, axis=1)[:, :k] for a in (self.zeros, self.scales))
        rest: Floats = self._weight - (self.codes - zeros.astype(np.float32)) * scales
        return rest

    def costs(self) -> Matrix:
        """Returns the error of each row on the inputs, [R]; without what damping added."""
        rest = self.rest()
        costs: Matrix = np.sum((rest @ self._hessian.matrix - rest * self._hessian.added) * rest, 1, dtype=np.float64)
        return costs


def _frozen(values: FloatArray) -> Floats:
    # Numba would compile once more for writable arrays.
    own = np.ascontiguousarray(values, np.float32).copy()
    own.flags.writeable = False
    return own
