"""One weight, one job: codes, scales and zero points come from one evaluation, when the first of them is written."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.errors import QuantizationError, RewriterError
from rewriter.quantize.types import QuantizedWeight, Quantizer, WeightContext, check_promise
from rewriter.tensors import View, drop_pages

Arrays = Sequence[npt.NDArray[np.generic]]


@dataclass(frozen=True, eq=False)
class QuantizationJob:
    """A weight that will be quantized.

    Attributes:
        weight: [N, K] view of the float weight.
        context: what the quantizer is told; holds bits, block size and symmetry.
        quantizer: computes the codes.
        written: called with the job, its quantized form and the bytes of its layout each time these are computed.
    """

    weight: View
    context: WeightContext
    quantizer: Quantizer
    written: Callable[[QuantizationJob, QuantizedWeight, int], None] = field(repr=False)
    _kept: list[QuantizedWeight | None] = field(default_factory=list, init=False, repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        n, k = self.weight.shape
        return n, k

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for jobs that give the same codes, so that a weight read twice at one spec is stored once."""
        return (self.weight, self.context.spec, self.context.scale_dtype, self.quantizer)

    def quantize(self) -> QuantizedWeight:
        """Reads and quantizes the weight.

        Raises:
            QuantizationError: the weight is not finite, or the quantizer broke its promise or failed.
        """
        if self._kept and self._kept[0] is not None:
            return self._kept[0]
        name = getattr(self.quantizer, "__name__", type(self.quantizer).__name__)
        try:
            result = self.quantizer(self.weight.numpy(), self.context)
        except RewriterError:
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            message = f"the quantizer '{name}' failed on weight '{self.context.weight}': {what}"
            raise QuantizationError(message) from error
        check_promise(result, self.shape, self.context, name)
        if self._kept:
            self._kept[0] = result
        return result


@contextlib.contextmanager
def quantized_once(jobs: Iterable[QuantizationJob]) -> Iterator[None]:
    """Keeps what each job computes until the block ends: both sides of a proof, and every part, ask for it."""
    jobs = tuple(jobs)
    for job in jobs:
        job._kept[:] = [None]
    try:
        yield
    finally:
        for job in jobs:
            job._kept.clear()


class PartTensor(ir.LazyTensor):
    """One of several tensors that come from one evaluation.

    Attributes:
        key: equal for equal tensors, so that the commit can share them.
        jobs: the weights that it is made of.
    """

    def __init__(
        self,
        parts: Parts,
        index: int,
        dtype: ir.DataType,
        shape: Sequence[int],
        name: str,
        jobs: tuple[QuantizationJob, ...],
    ) -> None:
        super().__init__(
            lambda: ir.Tensor(parts.take(index), dtype=dtype), dtype=dtype, shape=ir.Shape(shape), name=name
        )
        self.key = (*parts.key, index)
        self.jobs = jobs


class Parts(Protocol):
    """Several arrays that come from one evaluation, each taken once (or computed anew)."""

    key: tuple[object, ...]

    def take(self, index: int) -> npt.NDArray[np.generic]:
        """Returns one of them."""


class _Parts:
    """Evaluates once, hands each part out, and lets go when all have been taken."""

    def __init__(self, key: tuple[object, ...], evaluate: Callable[[], Arrays]) -> None:
        self.key = key
        self._evaluate = evaluate
        self._lock = threading.Lock()
        self._kept: dict[int, npt.NDArray[np.generic]] = {}

    def take(self, index: int) -> npt.NDArray[np.generic]:
        with self._lock:
            if index not in self._kept:
                self._kept = dict(enumerate(self._evaluate()))
            return self._kept.pop(index)


def lazy_parts(
    key: tuple[object, ...],
    evaluate: Callable[[], Arrays],
    parts: Sequence[tuple[str, ir.DataType, Sequence[int]]],
    jobs: tuple[QuantizationJob, ...] = (),
) -> tuple[PartTensor, ...]:
    """Returns one lazy tensor per part (name, dtype, shape) of what ``evaluate`` returns.

    Args:
        key: equal for evaluations that give the same parts.
        evaluate: computes all parts; called once for all of them, and again only if a part is read again.
        parts: name, element type and shape of each.
        jobs: the weights that the parts are made of.
    """
    shared = _Parts(key, evaluate)
    return tuple(PartTensor(shared, i, dtype, shape, name, jobs) for i, (name, dtype, shape) in enumerate(parts))


def packed_parts(
    job: QuantizationJob,
    layout: str,
    pack: Callable[[QuantizedWeight], Arrays],
    unpack: Callable[[Arrays], QuantizedWeight],
    parts: Sequence[tuple[str, ir.DataType, Sequence[int]]],
) -> tuple[PartTensor, ...]:
    """Returns the lazy tensors of one quantized weight in one layout; every write proves that the bytes read back.

    Args:
        job: the weight and how it is quantized.
        layout: name of the layout; part of what makes two tensors equal.
        pack: codes, scales and zero points -> the operator's arrays.
        unpack: exact inverse of ``pack``.
        parts: name, element type and shape of each array.
    """
    return lazy_parts((layout, *job.key), lambda: packed_arrays(job, layout, pack, unpack), parts, (job,))


def packed_arrays(
    job: QuantizationJob,
    layout: str,
    pack: Callable[[QuantizedWeight], Arrays],
    unpack: Callable[[Arrays], QuantizedWeight],
) -> Arrays:
    """Quantizes a weight, lays it out, proves that the bytes read back, and tells the job that it is written.

    Raises:
        QuantizationError: the weight cannot be quantized, or its bytes do not read back.
    """
    quantized = job.quantize()
    arrays = pack(quantized)
    back = unpack(arrays)
    same = np.array_equal(back.codes, quantized.codes) and np.array_equal(back.scales, quantized.scales)
    if back.zero_points is not None and quantized.zero_points is not None:
        same = same and np.array_equal(back.zero_points, quantized.zero_points)
    if not same or (back.zero_points is None) != (quantized.zero_points is None):
        raise QuantizationError(f"weight '{job.context.weight}': the bytes of layout {layout} do not read back")
    job.written(job, quantized, sum(a.nbytes for a in arrays))
    drop_pages(job.weight)
    return arrays
