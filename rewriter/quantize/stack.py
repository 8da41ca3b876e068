"""A stack of weights, one job each, as tensors [E, ...] that are computed and written one weight at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.quantize.job import (
    Arrays,
    PartTensor,
    QuantizationJob,
    StoredWeight,
    named_parts,
    packed_arrays,
)
from rewriter.quantize.rows import shared_out

Sink = Callable[[int, npt.NDArray[np.generic]], None]


class StackTensor(PartTensor):
    """A part of a stack; the codes are written expert by expert, so that they are never in memory whole."""

    stacked = True

    def __init__(self, stack: _Stack, index: int, *args: Any) -> None:
        super().__init__(stack, index, *args)
        self._stack = stack

    def some(self, experts: Sequence[int]) -> npt.NDArray[np.generic]:
        """Returns the part of some experts; the others are not computed."""
        return np.stack([self._stack.compute(expert)[self.index] for expert in experts])

    def tofile(self, file: Any) -> None:
        """Writes the codes as they are computed; scales and zero points are kept for their own turn."""
        if self.index:
            super().tofile(file)
        else:
            self._stack.evaluate(lambda _, codes: file.write(np.ascontiguousarray(codes).data))


class _Stack:
    """Computes all parts at once: the codes go out expert by expert, the small rest is kept until it is taken."""

    def __init__(
        self,
        jobs: tuple[QuantizationJob, ...],
        stored: StoredWeight,
    ) -> None:
        self.key: tuple[object, ...] = (f"{stored.name}-stack", *(job.key for job in jobs))
        self.stored = stored
        self._jobs = jobs
        self._lock = threading.Lock()
        self._kept: dict[int, npt.NDArray[np.generic]] = {}

    def compute(self, expert: int) -> Arrays:
        """Returns the arrays of one expert."""
        return packed_arrays(self._jobs[expert], self.stored)

    def evaluate(self, sink: Sink | None) -> None:
        """Computes all experts, as many at a time as there are cores; their codes go to ``sink`` in turn."""
        with self._lock:
            self._evaluate(sink)

    def take(self, index: int) -> npt.NDArray[np.generic]:
        """Returns one part whole; another thread that is computing it is waited for."""
        with self._lock:
            if index == 0:
                codes: list[npt.NDArray[np.generic]] = []
                self._evaluate(lambda _, part: codes.append(part))
                return np.stack(codes)
            if index not in self._kept:
                self._evaluate(None)
            return self._kept.pop(index)

    def _evaluate(self, sink: Sink | None) -> None:
        kept: dict[int, npt.NDArray[np.generic]] = {}
        for expert, arrays in enumerate(shared_out(self.compute, range(len(self._jobs)))):
            if sink is not None:
                sink(expert, arrays[0])
            for index, part in enumerate(arrays[1:], 1):
                kept.setdefault(index, np.empty((len(self._jobs), *part.shape), part.dtype))[expert] = part
        self._kept = kept


def packed_stack(
    jobs: Sequence[QuantizationJob], stored: StoredWeight, name: str, scale_dtype: ir.DataType
) -> tuple[PartTensor, ...]:
    """Returns the lazy tensors of a stack of quantized weights in one layout; every expert's bytes are read back.

    Args:
        jobs: one for each expert; all with one shape and one spec.
        stored: how one expert is stored.
        name: what the tensors' names begin with.
        scale_dtype: element type of the scales.
    """
    own = tuple(jobs)
    stack = _Stack(own, stored)
    parts = named_parts(stored, name, scale_dtype)
    return tuple(
        StackTensor(stack, i, part.dtype, (len(own), *part.shape), part.name, own) for i, part in enumerate(parts)
    )
