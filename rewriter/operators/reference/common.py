"""What the reference operators share: float views of any dtype, and errors that name the operator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rewriter.errors import ModelError, TargetError

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
