"""Reference com.microsoft::MatMulNBits."""

from __future__ import annotations

import numpy as np
from onnx.reference.op_run import OpRun

from rewriter.operators.layout.packing import unpack_codes
from rewriter.operators.layout.stored import Refusal
from rewriter.operators.matmul_nbits import LAYOUTS, MATMUL_NBITS
from rewriter.operators.operator import DOMAIN
from rewriter.operators.reference.common import (
    Array,
    as_float32,
    malformed,
    reshaped,
    slots,
    unsupported,
)
from rewriter.quantize.types import QuantizedShape, dequantize

OPERATOR = MATMUL_NBITS.name


class MatMulNBits(OpRun):
    """``A [..., K] @ dequantize(B [N, K]).T + bias [N]``, in float32, returned in A's dtype.

    ``accuracy_level`` is how inexact a kernel may be; the reference is exact at every level.

    Source: the operator's schema; checked against ONNX Runtime's CPU kernel.
    """

    op_domain = DOMAIN

    def _run(
        self,
        *inputs: Array | None,
        K: int,  # noqa: N803  # the attributes' own names
        N: int,  # noqa: N803
        block_size: int,
        bits: int = 4,
        accuracy_level: int = 0,
        weight_prepacked: int = 0,
    ) -> tuple[Array]:
        """Runs the operator on A, B, scales [, zero_points, g_idx, bias].

        Raises:
            TargetError: g_idx, or a shape that the layout does not have.
            ModelError: shapes that do not belong together.
        """
        a, b, scales, zeros, g_idx, bias = slots(OPERATOR, inputs, required=(0, 1, 2), total=6)
        if weight_prepacked not in range(len(LAYOUTS)):
            raise unsupported(OPERATOR, f"weight_prepacked={weight_prepacked}")
        packed_zeros = zeros is not None and zeros.dtype == np.uint8
        stored = LAYOUTS[weight_prepacked].of(QuantizedShape(N, K, bits, block_size, symmetric=not packed_zeros))
        if isinstance(stored, Refusal):
            raise unsupported(OPERATOR, stored.reason)
        if g_idx is not None and g_idx.size:
            raise unsupported(OPERATOR, "g_idx, which is deprecated")
        if a.shape[-1:] != (K,):
            raise malformed(OPERATOR, f"A has shape {list(a.shape)}; its last dimension must be K = {K}")
        codes = stored.unpack_codes(reshaped(OPERATOR, "B", b, stored.codes))
        if stored.zero_points is not None:
            zeros = unpack_codes(reshaped(OPERATOR, "zero_points", zeros, stored.zero_points), bits, stored.scales[1])
        elif zeros is not None:
            zeros = reshaped(OPERATOR, "zero_points", zeros, stored.scales)
        weight = dequantize(codes, reshaped(OPERATOR, "scales", scales, stored.scales), zeros, bits, block_size)
        y = as_float32(a) @ weight.T
        if bias is not None:
            y += as_float32(reshaped(OPERATOR, "bias", bias, (N,)))
        return (y.astype(a.dtype),)
