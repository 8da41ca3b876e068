"""Reference com.microsoft::MatMulNBits."""

from __future__ import annotations

import numpy as np
from onnx.reference.op_run import OpRun

from rewriter.operators.layout import matmul_nbits as layout
from rewriter.operators.layout.packing import packed_width, unpack_codes
from rewriter.operators.reference._common import (
    DOMAIN,
    Array,
    as_float32,
    dequantize,
    malformed,
    reshaped,
    slots,
    unsupported,
)

OPERATOR = "MatMulNBits"

PREPACKED = {0: None, 1: 80, 2: 90}
"""``weight_prepacked`` to the architecture whose CUTLASS layout B holds."""


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
        if weight_prepacked not in PREPACKED:
            raise unsupported(OPERATOR, f"weight_prepacked={weight_prepacked}")
        prepacked = PREPACKED[weight_prepacked]
        if reason := layout.illegal(N, K, bits, block_size, prepacked=prepacked):
            raise unsupported(OPERATOR, reason)
        if g_idx is not None and g_idx.size:
            raise unsupported(OPERATOR, "g_idx, which is deprecated")
        if a.shape[-1:] != (K,):
            raise malformed(OPERATOR, f"A has shape {list(a.shape)}; its last dimension must be K = {K}")
        b_shape, scales_shape, _ = layout.shapes(N, K, bits, block_size, symmetric=True)
        b = reshaped(OPERATOR, "B", b, b_shape)
        codes = layout.unpack_b(b, N, K, bits, block_size, prepacked=prepacked)
        if zeros is not None and zeros.dtype == np.uint8:
            packed = reshaped(OPERATOR, "zero_points", zeros, (N, packed_width(b_shape[1], bits)))
            zeros = unpack_codes(packed, bits, b_shape[1])
        elif zeros is not None:
            zeros = reshaped(OPERATOR, "zero_points", zeros, scales_shape)
        weight = dequantize(codes, reshaped(OPERATOR, "scales", scales, scales_shape), zeros, bits, block_size)
        y = as_float32(a) @ weight.T
        if bias is not None:
            y += as_float32(reshaped(OPERATOR, "bias", bias, (N,)))
        return (y.astype(a.dtype),)
