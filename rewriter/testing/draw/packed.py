"""Weights that are quantized already: codes and scales that follow from their names, as operators store them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rewriter.operators import matmul_nbits, qmoe
from rewriter.operators.gather_block_quantized import GATHER_BLOCK_QUANTIZED
from rewriter.operators.layout.stored import by_name
from rewriter.operators.matmul_nbits import MATMUL_NBITS
from rewriter.quantize.types import QuantizedWeight
from rewriter.testing.draw.graph import Scope

BITS = (4, 8, 2)
ZERO_POINTS = ("none", "packed", "flat", "float")
"""Of a MatMulNBits: 2^(bits-1) everywhere, packed along blocks, the same with every operand flattened, of x's type."""
LAYOUTS = ("raw", "cutlass-sm90")


@dataclass(frozen=True)
class Packing:
    """How a weight is quantized.

    Attributes:
        bits: width of a code.
        block: input features per scale; 0 is the whole row.
        zero_points: one of ``ZERO_POINTS``.
        layout: one of ``LAYOUTS``.
    """

    bits: int
    block: int
    zero_points: str = "none"
    layout: str = "raw"


def quantized(name: str, n: int, k: int, packing: Packing, dtype: str) -> QuantizedWeight:
    """Returns an [N, K] weight below 1 that follows from its name; scales of both signs, which float16 holds."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    top = 1 << packing.bits
    blocks = -(-k // (packing.block or k))
    codes = generator.integers(0, top, (n, k), dtype=np.uint8, endpoint=False)
    scales = generator.choice([-3, -2, -1, 1, 2, 3], (n, blocks)) / (4 * top)
    zeros = generator.integers(0, top, (n, blocks)).astype(np.uint8)
    own = None if packing.zero_points == "none" else zeros
    return QuantizedWeight(codes, scales.astype(dtype), own, packing.bits, packing.block)


def store(scope: Scope, name: str, size: tuple[int, int], packing: Packing, dtype: str) -> tuple[str, str, str]:
    """Writes the [N, K] weight ``name`` as a MatMulNBits holds it; returns B, scales and zero points, or empty."""
    weight = quantized(name, *size, packing, dtype)
    layout = by_name(matmul_nbits.LAYOUTS, packing.layout) or matmul_nbits.RAW
    b, scales, *packed = layout.require(weight.shape).pack(weight)
    zeros = packed[0] if packed else None
    if packing.zero_points == "flat":
        scales, zeros = scales.reshape(-1), None if zeros is None else zeros.reshape(-1)
    elif packing.zero_points == "float" and weight.zero_points is not None:
        zeros = weight.zero_points.astype(dtype)
    return (
        scope.constant(f"{name}_Q{packing.bits}", b),
        scope.constant(f"{name}_scales", scales),
        "" if zeros is None else scope.constant(f"{name}_zero_points", zeros),
    )


def multiply(
    scope: Scope,
    x: str,
    name: str,
    size: tuple[int, int],
    packing: Packing,
    dtype: str,
    *,
    lead: Sequence[int | str] = ("T",),
    bias: str = "",
) -> str:
    """Writes the MatMulNBits [.., N] of x [.., K] and the weight ``name``.

    Args:
        scope: where it is written.
        x: the activations.
        name: of the weight.
        size: (N, K).
        packing: of the weight; its block is not 0.
        dtype: of x and the scales.
        lead: dimensions before K.
        bias: [N], or empty.
    """
    attributes: dict[str, Any] = {"N": size[0], "K": size[1], "bits": packing.bits, "block_size": packing.block}
    if packing.layout != "raw":
        names = [layout.name for layout in matmul_nbits.LAYOUTS]
        attributes["weight_prepacked"] = names.index(packing.layout)
    operands = (x, *store(scope, name, size, packing, dtype), "", bias)
    return scope.contrib(MATMUL_NBITS.name, *operands, dtype=dtype, shape=[*lead, size[0]], **attributes)


def look_up(scope: Scope, ids: str, name: str, size: tuple[int, int], packing: Packing, dtype: str) -> str:
    """Writes the GatherBlockQuantized [T, H] of ids [T] and the weight ``name`` [V, H], as a MatMulNBits holds it."""
    v, h = size
    b, scales, zeros = store(scope, name, size, packing, dtype)
    table = scope.op("Reshape", b, scope.ints(v, h * packing.bits // 8))
    attributes = {"gather_axis": 0, "quantize_axis": 1, "bits": packing.bits, "block_size": packing.block}
    operands = (table, ids, scales, zeros)
    return scope.contrib(GATHER_BLOCK_QUANTIZED.name, *operands, dtype=dtype, shape=["T", h], **attributes)


def stacks(
    name: str, experts: int, size: tuple[int, int], packing: Packing, dtype: str
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any] | None]:
    """Returns codes, scales and zero points of E experts [N, K] each, as QMoE reads them."""
    layout = qmoe.layout_named(packing.layout)
    weights = [quantized(f"{name}.{expert}", *size, packing, dtype) for expert in range(experts)]
    codes, scales, *zeros = zip(*(layout.require(weight.shape).pack(weight) for weight in weights), strict=True)
    return np.stack(codes), np.stack(scales), np.stack(zeros[0]) if zeros else None
