"""MSE search: the integer zero point and the scale of least squared error, searched jointly.

A coarse sweep over scales finds how far to clip. Around the scale that it finds, a finer sweep looks for the best codes
with the zero point that fits the range and with its two neighbours, and walks on past the better of these for as long
as that helps (symmetric: it tries both signs of the scale). The finest sweep is around the best of all. The error of
each sweep's codes is that with their least-squares scale, which a closed form gives. The best scale is rounded as it
will be stored, and once more fitted to its codes. What is compared in the end is the error of the codes that would be
written, weighted by the importance where one is given. No block is worse than by round-to-nearest.
"""

from __future__ import annotations

from rewriter.quantize import four_bit_floats, kernels
from rewriter.quantize.formats import INT
from rewriter.quantize.rows import quantize_rows
from rewriter.quantize.types import FloatArray, QuantizedWeight, WeightContext


def quantize(weight: FloatArray, context: WeightContext) -> QuantizedWeight:
    """Searches the grids of an [N, K] weight block by block.

    Raises:
        QuantizationError: the weight is not finite, or a scale overflows its dtype.
    """
    if context.spec.format != INT.name:
        return four_bit_floats.quantize(weight, context, search=True)
    return quantize_rows(kernels.MSE_SEARCH, weight, context)
