"""Reference com.microsoft::GatherBlockQuantized."""

from __future__ import annotations

import numpy as np
from onnx.reference.op_run import OpRun

from rewriter.operators.gather_block_quantized import GATHER_BLOCK_QUANTIZED
from rewriter.operators.layout.packing import codes_per_byte, packed_width, unpack_codes
from rewriter.operators.operator import DOMAIN
from rewriter.operators.reference.common import Array, malformed, reshaped, slots, unsupported
from rewriter.quantize.types import dequantize

OPERATOR = GATHER_BLOCK_QUANTIZED.name


class GatherBlockQuantized(OpRun):
    """Gathers rows of a block-quantized table and dequantizes them; returned in the dtype of the scales.

    uint8 data, gathered along axis 0 and quantized along the last. An index out of range gives zeros.

    Source: the operator's schema; checked against ONNX Runtime's CPU kernel.
    """

    op_domain = DOMAIN

    def _run(
        self,
        *inputs: Array | None,
        bits: int = 4,
        block_size: int = 128,
        gather_axis: int = 0,
        quantize_axis: int = 1,
    ) -> tuple[Array]:
        """Runs the operator on data, indices, scales [, zero_points].

        Raises:
            TargetError: data other than uint8, or other axes.
            ModelError: shapes that do not belong together.
        """
        data, indices, scales, zeros = slots(OPERATOR, inputs, required=(0, 1, 2), total=4)
        rank = data.ndim
        if data.dtype != np.uint8:
            raise unsupported(OPERATOR, f"{data.dtype} data")
        if bits not in (2, 4, 8):
            raise unsupported(OPERATOR, f"bits={bits}")
        if gather_axis % rank or quantize_axis % rank != rank - 1 or rank < 2:
            raise unsupported(
                OPERATOR,
                f"gather_axis={gather_axis} and quantize_axis={quantize_axis} of rank {rank}; they must be 0, -1",
            )
        if block_size < 16 or block_size & (block_size - 1):
            raise malformed(OPERATOR, f"block_size={block_size} is not a power of two of at least 16")
        lead, k = data.shape[:-1], data.shape[-1] * codes_per_byte(bits)
        blocks = -(-k // block_size)
        scales = reshaped(OPERATOR, "scales", scales, (*lead, blocks))
        if zeros is not None:
            zeros = reshaped(OPERATOR, "zero_points", zeros, (*lead, packed_width(blocks, bits)))
        rows = np.where(indices < 0, indices + lead[0], indices)
        outside = (rows < 0) | (rows >= lead[0])
        rows = np.where(outside, 0, rows)
        zero_points = None if zeros is None else unpack_codes(zeros[rows], bits, blocks)
        y = dequantize(unpack_codes(data[rows], bits, k), scales[rows], zero_points, bits, block_size)
        y[outside] = 0
        return (y.astype(scales.dtype),)
