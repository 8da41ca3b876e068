"""k-quant: llama.cpp's weighted least-squares fit, as ``quant_tensor_k_quant`` of ONNX Runtime and Olive has it.

Asymmetric: for 8 grids around the one that just holds the block, the line (scale, minimum) through their codes that
minimises the squared error weighted by (root mean square + magnitude); of these the best. Symmetric: the same without
a minimum. Three things differ from the other implementations: the range is first widened to hold 0, for a zero point is
a code; for the zero point rounded, and for that of round-to-nearest, a few scales that clip more or less are tried, and
the best of them is refitted by least squares; and a block that round-to-nearest serves better is given to it.

Source: ``make_qkx2_quants`` of ggml-quants.c describes the fit.
"""

from __future__ import annotations

from rewriter.errors import QuantizationError
from rewriter.quantize import kernels
from rewriter.quantize.formats import INT
from rewriter.quantize.rows import quantize_rows
from rewriter.quantize.types import FloatArray, QuantizedWeight, WeightContext


def quantize(weight: FloatArray, context: WeightContext) -> QuantizedWeight:
    """Fits an [N, K] weight block by block; importance multiplies the weights of the squared error.

    Raises:
        QuantizationError: the weight is not finite, or a scale overflows its dtype.
    """
    if context.spec.format != INT.name:
        raise QuantizationError(f"weight '{context.weight}': k-quant fits integers, not {context.spec.format}")
    return quantize_rows(kernels.K_QUANT, weight, context)
