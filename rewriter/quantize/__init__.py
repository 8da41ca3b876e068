"""Quantizers: a float weight in, codes, scales and zero points out, in no particular layout.

An algorithm is a module with one function, ``quantize``.
"""

from __future__ import annotations

from rewriter.quantize import gptq, k_quant, lossless, mse_search, rtn
from rewriter.quantize.error import relative_rms
from rewriter.quantize.types import (
    CodeArray,
    FloatArray,
    QuantizedWeight,
    Quantizer,
    WeightContext,
    WeightSpec,
    check_promise,
)

ALGORITHMS: dict[str, Quantizer] = {
    "rtn": rtn.quantize,
    "k-quant": k_quant.quantize,
    "mse-search": mse_search.quantize,
    "gptq": gptq.quantize,
    lossless.NAME: lossless.quantize,
}
"""The built-in algorithms by the name that YAML gives them."""

__all__ = [
    "ALGORITHMS",
    "CodeArray",
    "FloatArray",
    "QuantizedWeight",
    "Quantizer",
    "WeightContext",
    "WeightSpec",
    "check_promise",
    "relative_rms",
]
