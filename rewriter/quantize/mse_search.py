"""MSE search: the integer zero point and the scale of least squared error, searched jointly.

A coarse sweep over scales finds how far to clip. From the zero point that fits the range, the search walks to its
neighbours for as long as they are better (symmetric: it tries both signs of the scale); for each it sweeps 16 scales
around the coarse one, takes the least-squares scale of the best codes, rounds it as it will be stored, and alternates
between codes and scale until the error settles. What is compared is the error of the codes that would be written,
weighted by the importance where one is given. No block is worse than by round-to-nearest.
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
