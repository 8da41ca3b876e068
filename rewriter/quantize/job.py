"""One weight, one job: codes, scales and zero points come from one evaluation, when the first of them is written."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.errors import OverflowingError, QuantizationError, RewriterError
from rewriter.quantize.measured import Measured, measure, same
from rewriter.quantize.types import (
    FloatArray,
    QuantizedShape,
    QuantizedWeight,
    Quantizer,
    WeightContext,
    WeightSpec,
    check_promise,
    largest,
)
from rewriter.tensors import View, drop_pages
from rewriter.tensors.strides import row_major

_LARGEST_HALF = 65504

_COPIED = 1 << 23
"""Bytes of a weight that is copied where its rows lie apart; a larger one is read in chunks."""

Arrays = Sequence[npt.NDArray[Any]]


class Part(NamedTuple):
    """One of the arrays that an operator reads in place of a weight.

    Attributes:
        name: of the tensor, or what follows the weight's name in it.
        dtype: element type.
        shape: of one weight; a stack has one axis more.
    """

    name: str
    dtype: ir.DataType
    shape: Sequence[int]


class StoredWeight(Protocol):
    """How one quantized weight is stored: what ``operators.layout.stored.Stored`` is."""

    @property
    def name(self) -> str:
        """Equal for weights whose arrays mean the same."""

    def parts(self, scale_dtype: ir.DataType) -> Sequence[Part]:
        """Returns the arrays: what follows the weight's name in theirs, type and shape."""

    def pack(self, weight: QuantizedWeight) -> Arrays:
        """Returns the arrays."""

    def unpack(self, arrays: Arrays) -> QuantizedWeight:
        """Exact inverse of ``pack``."""


@dataclass(frozen=True, eq=False)
class QuantizationJob:
    """A weight that will be quantized.

    Attributes:
        weight: [N, K] view of the float weight.
        context: what the quantizer is told; holds bits, block size and symmetry.
        quantizer: computes the codes.
        written: told what became of the weight each time that it is computed, or found written by an earlier run.
    """

    weight: View
    context: WeightContext
    quantizer: Quantizer
    written: Callable[[QuantizationJob, Measured], None] = field(repr=False)
    _kept: list[QuantizedWeight | None] = field(default_factory=list, init=False, repr=False)
    _measured: list[Measured] = field(default_factory=list, init=False, repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        n, k = self.weight.shape
        return n, k

    @property
    def stored_shape(self) -> QuantizedShape:
        """What a layout must know of the weight that this makes."""
        return self.shape_in(self.context.spec)

    def shape_in(self, spec: WeightSpec) -> QuantizedShape:
        """What a layout would have to know of the weight, were it quantized by another spec."""
        return QuantizedShape(*self.shape, spec.bits, spec.block_size, spec.symmetric, spec.format)

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for jobs that give the same codes, so that a weight read twice at one spec is stored once."""
        return (self.weight, self.context.spec, self.context.scale_dtype, self.quantizer)

    @property
    def measured(self) -> Measured | None:
        """What became of the weight when it was last computed; None where it never was."""
        return self._measured[0] if self._measured else None

    def tell(self, measured: Measured) -> None:
        """Keeps what became of the weight, and passes it on."""
        self._measured[:] = [measured]
        self.written(self, measured)

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs to quantize the weight: all but who is told of it here."""
        return {**vars(self), "written": _to_nobody, "_kept": [], "_measured": []}

    def quantize(self, weight: FloatArray | None = None) -> QuantizedWeight:
        """Quantizes the weight, which is read here where it is not given.

        Raises:
            QuantizationError: the weight is not finite, or the quantizer broke its promise or failed.
            OverflowingError: what it makes of the weight is too large for the weight's type.
        """
        if self._kept and self._kept[0] is not None:
            return self._kept[0]
        name = getattr(self.quantizer, "__name__", type(self.quantizer).__name__)
        weight = self.weight.numpy() if weight is None else weight
        try:
            result = self.quantizer(weight, self.context)
        except RewriterError:
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            message = f"the quantizer '{name}' failed on weight '{self.context.weight}': {what}"
            raise QuantizationError(message) from error
        check_promise(result, self.shape, self.context, name)
        self._require_finite(result)
        if self._kept:
            self._kept[0] = result
        return result

    def _require_finite(self, result: QuantizedWeight) -> None:
        """Kernels compute in the weight's type, and a code next to the largest half float may stand for more."""
        if self.weight.dtype != ir.DataType.FLOAT16:
            return
        # No code stands for more than 2^bits: a look at the scales is enough for all but the largest numbers.
        most = largest(result.scales) * result.global_scale * (1 << result.bits)
        if most > _LARGEST_HALF and np.abs(result.dequantize()).max() > _LARGEST_HALF:
            name = self.context.weight
            raise OverflowingError(
                f"weight '{name}' holds the largest numbers of float16; quantized, they are infinite"
            )


def _to_nobody(*_: object) -> None:
    pass


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
        stacked: whether it holds a part of each job's weight, one after another; else of the first job's.
        key: equal for equal tensors, so that the commit can share them.
        jobs: the weights that it is made of.
        parts: the evaluation.
        index: which of its parts this is.
    """

    stacked: ClassVar[bool] = False

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
        self.parts = parts
        self.index = index

    @property
    def is_bytes(self) -> bool:
        """Whether its elements lie in the bytes of a file as in memory; those narrower than a byte do not."""
        return self.dtype.bitwidth >= 8


class Parts(Protocol):
    """Several arrays that come from one evaluation, each taken once (or computed anew)."""

    key: tuple[object, ...]

    @property
    def stored(self) -> StoredWeight:
        """How one weight is stored in them."""

    def take(self, index: int) -> npt.NDArray[np.generic]:
        """Returns one of them."""


class _Parts:
    """Evaluates once, hands each part out, and lets go when all have been taken."""

    def __init__(self, job: QuantizationJob, stored: StoredWeight) -> None:
        self.key: tuple[object, ...] = (stored.name, *job.key)
        self.stored = stored
        self._job = job
        self._lock = threading.Lock()
        self._kept: dict[int, npt.NDArray[np.generic]] = {}

    def take(self, index: int) -> npt.NDArray[np.generic]:
        with self._lock:
            if index not in self._kept:
                arrays = packed_arrays(self._job, self.stored)
                self._kept = dict(enumerate(arrays))
            return self._kept.pop(index)


def named_parts(stored: StoredWeight, weight: str, scale_dtype: ir.DataType) -> tuple[Part, ...]:
    """Returns the arrays of a stored weight, named after the weight."""
    return tuple(part._replace(name=f"{weight}_{part.name}") for part in stored.parts(scale_dtype))


def packed_parts(
    job: QuantizationJob,
    stored: StoredWeight,
    name: str,
    scale_dtype: ir.DataType,
    also: Iterable[QuantizationJob] = (),
) -> tuple[PartTensor, ...]:
    """Returns the lazy tensors of one quantized weight in one layout; every write proves that the bytes read back.

    Args:
        job: the weight and how it is quantized.
        stored: how it is stored.
        name: what the tensors' names begin with.
        scale_dtype: element type of the scales.
        also: other weights that the tensors take the place of.
    """
    parts = named_parts(stored, name, scale_dtype)
    shared, jobs = _Parts(job, stored), (job, *also)
    return tuple(PartTensor(shared, i, *part[1:], part.name, jobs) for i, part in enumerate(parts))


def packed_arrays(job: QuantizationJob, stored: StoredWeight) -> Arrays:
    """Quantizes a weight, lays it out, proves that the bytes read back, and tells the job that it is written.

    In a proof nothing is written, and nothing told.

    Raises:
        QuantizationError: the weight cannot be quantized, or its bytes do not read back.
    """
    weight = None if job._kept else job.weight.numpy()  # once: a stack may have to be put together
    if weight is not None and weight.nbytes <= _COPIED:
        weight = row_major(weight)  # to be quantized and to be measured, columns would be read twice
    quantized = job.quantize(weight)
    arrays = stored.pack(quantized)
    if not same(stored.unpack(arrays), quantized):
        raise QuantizationError(f"weight '{job.context.weight}': the bytes of layout {stored.name} do not read back")
    if weight is not None:
        nbytes = sum(a.nbytes for a in arrays)
        job.tell(measure(weight, quantized, nbytes, job.context.activations))
    drop_pages(job.weight)
    return arrays
