"""What the reference operators share: float views of any dtype, dequantization and errors that name the operator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rewriter.errors import ModelError, TargetError
from rewriter.operators.layout.packing import default_zero_point

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]


def unsupported(operator: str, what: str) -> TargetError:
    """Returns the error for what the reference does not define: it never approximates."""
    return TargetError(f"the reference {operator} cannot run {what}")


def malformed(operator: str, what: str) -> ModelError:
    """Returns the error for a node that breaks its operator's specification."""
    return ModelError(f"malformed {operator}: {what}")


def as_float32(array: Array) -> Float32:
    """Returns ``array`` (float32, float16 or bfloat16) as float32, every value kept."""
    return np.asarray(array).astype(np.float32, copy=False)


def slots(operator: str, inputs: Sequence[Array | None], required: Sequence[int], total: int) -> list[Any]:
    """Returns the inputs by slot, the absent optional ones at the end as None.

    Raises:
        ModelError: a required input is absent, or there are more inputs than slots.
    """
    if len(inputs) > total:
        raise malformed(operator, f"{len(inputs)} inputs; it has {total}")
    padded = [*inputs, *(None for _ in range(total - len(inputs)))]
    for slot in required:
        if padded[slot] is None:
            raise malformed(operator, f"required input {slot} is absent")
    return padded


def reshaped(operator: str, name: str, array: Array, shape: tuple[int, ...]) -> Array:
    """Returns ``array`` with ``shape``; axes that an exporter flattened are as good.

    Raises:
        ModelError: the number of elements differs.
    """
    if array.size != math.prod(shape):
        raise malformed(operator, f"{name} has shape {list(array.shape)}; expected {list(shape)}")
    return array.reshape(shape)


def dequantize(codes: Array, scales: Array, zero_points: Array | None, bits: int, block: int) -> Float32:
    """Returns ``(code - zero_point) * scale``.

    Args:
        codes: [..., K] uint8.
        scales: [..., ceil(K / block)], any float dtype.
        zero_points: [..., ceil(K / block)] uint8 or float, or None for 2^(bits-1).
        bits: width of a code.
        block: input features per scale; 0 is the whole row.

    Returns:
        [..., K] float32.
    """
    k = codes.shape[-1]
    weight = codes.astype(np.float32)
    scale = as_float32(scales)
    zero = None if zero_points is None else as_float32(zero_points)
    if zero is None:
        weight -= default_zero_point(bits)
    if block and k % block == 0:
        blocks = weight.reshape(*codes.shape[:-1], k // block, block)
        if zero is not None:
            blocks -= zero[..., None]
        blocks *= scale[..., None]
        return weight
    repeats = block or k
    if zero is not None:
        weight -= np.repeat(zero, repeats, axis=-1)[..., :k]
    weight *= np.repeat(scale, repeats, axis=-1)[..., :k]
    return weight
