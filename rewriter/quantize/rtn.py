"""Round to nearest: scale and zero point are read off the range of each block.

Symmetric: the larger end of the range gets the longer side of the codes, so half of the scales are negative.
Asymmetric: the range is widened to hold 0.
Codes, scales and zero points are those of ONNX Runtime's ``quantize_matmul_{2,4,8}bits``, bit for bit.
"""

from __future__ import annotations

from rewriter.quantize import four_bit_floats, kernels
from rewriter.quantize.formats import INT
from rewriter.quantize.rows import quantize_rows
from rewriter.quantize.types import FloatArray, QuantizedWeight, WeightContext


def quantize(weight: FloatArray, context: WeightContext) -> QuantizedWeight:
    """Rounds an [N, K] weight to the nearest codes in the range of each block; importance is ignored.

    Raises:
        QuantizationError: the weight is not finite, or a scale overflows its dtype.
    """
    if context.spec.format != INT.name:
        return four_bit_floats.quantize(weight, context, search=False)
    return quantize_rows(kernels.RTN, weight, context)
