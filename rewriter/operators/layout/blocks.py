"""Weights of integers in blocks, as MatMulNBits and GatherBlockQuantized take them, and the shapes of their arrays."""

from __future__ import annotations

from rewriter.graph.declines import OTHER_BLOCK_SIZE, Reason
from rewriter.quantize.formats import INT
from rewriter.quantize.types import QuantizedShape


def refuse(shape: QuantizedShape, operator: str) -> str | None:
    """Returns why the operator cannot hold a weight, or None."""
    if shape.format != INT.name:
        return f"codes are {shape.format}; {operator} takes integers"
    if shape.bits not in (2, 4, 8):
        return f"bits is {shape.bits}; {operator} takes 2, 4 or 8"
    if not shape.block:
        return Reason(f"{operator} has no scale for a whole row, but for blocks of 16, 32, 64, ...", OTHER_BLOCK_SIZE)
    return refuse_odd(shape, operator)


def refuse_odd(shape: QuantizedShape, operator: str) -> str | None:
    """Returns why the operator has no such block size, or None."""
    if shape.block and (shape.block < 16 or shape.block & (shape.block - 1)):
        reason = f"block size {shape.block} is not a power of two of at least 16, as {operator} needs"
        return Reason(reason, OTHER_BLOCK_SIZE)
    return None


def refuse_partial(shape: QuantizedShape, who: str) -> str | None:
    """Returns that a row ends within a block, where it does, as ``who`` cannot have it."""
    if shape.block and shape.k % shape.block:
        reason = f"K = {shape.k} is not divisible by the block size {shape.block}, as {who} needs"
        return Reason(reason, OTHER_BLOCK_SIZE)
    return None


def per_block(shape: QuantizedShape) -> tuple[int, ...]:
    """Returns [N, ceil(K / block)], of scales."""
    return shape.n, shape.blocks


def blobs(shape: QuantizedShape) -> tuple[int, ...]:
    """Returns [N, ceil(K / block), block * bits / 8], of codes."""
    return shape.n, shape.blocks, shape.block * shape.bits // 8
