"""Planned writes: where every tensor will lie is known before any weight is read.

A write is all that comes from one evaluation, as the codes and scales of a weight, or of some experts of a stack, and
the range of a data file for each. It needs nothing of any other write, and made twice it leaves the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from rewriter.graph.contents import Slot
from rewriter.quantize import ALGORITHMS
from rewriter.quantize.job import PartTensor, QuantizationJob, StoredWeight, packed_arrays
from rewriter.quantize.measured import Measured
from rewriter.tensors import drop_pages
from rewriter.tensors.digest import Digest, DigestingFile, digest_of, digest_of_range

STEP = 1 << 25
"""Weights that one core quantizes in one write: a stack of more is written in several, for all cores to have some."""

SLOWER = 32
"""How many times as long it may take by what the weights saw, or by a quantizer of the user's own."""


@dataclass(frozen=True)
class Range:
    """A part of a data file: its name in the folder, and bytes."""

    file: str
    offset: int
    length: int

    def digest(self, folder: Path) -> bytes:
        """Returns the digest of what a file of the folder holds there."""
        return digest_of_range(folder / self.file, self.offset, self.length)


@dataclass(frozen=True)
class Piece:
    """A part of a tensor, by bytes."""

    tensor: ir.TensorProtocol
    start: int
    length: int

    @property
    def lies(self) -> Range | None:
        """Where it lies, in a file that is named by its whole path; None where the tensor is in memory."""
        if not isinstance(self.tensor, ir.ExternalTensor):
            return None
        return Range(str(Path(self.tensor.path).absolute()), (self.tensor.offset or 0) + self.start, self.length)

    def digest(self) -> bytes:
        """Returns the digest of what is stored now."""
        if (place := self.lies) is not None:
            return place.digest(Path())
        return digest_of(self.tensor.tobytes()[self.start : self.start + self.length])


@dataclass(frozen=True)
class Outcome:
    """What is known of a write that was made.

    Attributes:
        digests: of the bytes of each piece; empty where nothing was computed.
        measured: what became of each weight.
    """

    digests: tuple[bytes, ...] = ()
    measured: tuple[Measured, ...] = ()


Task = Callable[[Path], Outcome]
"""Makes a write into a folder whose data files are there in their full size."""


def make(tasks: Iterable[Task], folder: Path) -> list[Outcome]:
    """Makes writes, one after the other."""
    return [task(folder) for task in tasks]


@dataclass(frozen=True, eq=False)
class Write:
    """A planned write.

    Attributes:
        pieces: what is written.
        ranges: where each piece will lie.
        task: makes it; that of weights may be sent to another process, or machine.
        jobs: the weights that are quantized for it.
    """

    pieces: tuple[Piece, ...]
    ranges: tuple[Range, ...]
    task: Task
    jobs: tuple[QuantizationJob, ...] = ()

    @property
    def is_computed(self) -> bool:
        """Whether anything is computed for it; else it is a copy of stored bytes."""
        return isinstance(self.pieces[0].tensor, ir.LazyTensor)

    @property
    def nbytes(self) -> int:
        """Bytes of all its pieces."""
        return sum(place.length for place in self.ranges)

    def lies_in(self, folder: Path, outcome: Outcome) -> bool:
        """Whether a folder holds the bytes that an earlier run noted."""
        try:
            found = [place.digest(folder) for place in self.ranges]
        except OSError:
            return False
        return found == list(outcome.digests) and len(outcome.measured) == len(self.jobs)


@dataclass(frozen=True)
class QuantizeTask:
    """Quantizes weights, some at a time, and writes what they become.

    Attributes:
        jobs: the weights.
        stored: how each is stored.
        parts: which of its arrays are written, and where those of all the weights will lie.
    """

    jobs: tuple[QuantizationJob, ...]
    stored: StoredWeight
    parts: tuple[tuple[int, Range], ...]

    def __call__(self, folder: Path) -> Outcome:
        digests = [Digest() for _ in self.parts]
        with ExitStack() as stack:
            files = {place.file: stack.enter_context((folder / place.file).open("r+b")) for _, place in self.parts}
            for position, job in enumerate(self.jobs):
                arrays = packed_arrays(job, self.stored)
                for digest, (index, place) in zip(digests, self.parts, strict=True):
                    data = np.ascontiguousarray(arrays[index]).reshape(-1).view(np.uint8).data
                    digest.add(data)
                    files[place.file].seek(place.offset + position * len(data))
                    files[place.file].write(data)
        measured = (job.measured for job in self.jobs)
        return Outcome(tuple(d.value() for d in digests), tuple(found for found in measured if found is not None))


@dataclass(frozen=True)
class TensorTask:
    """Writes a tensor: a copy of stored bytes, or what is put together from them."""

    tensor: ir.TensorProtocol
    place: Range

    def __call__(self, folder: Path) -> Outcome:
        with (folder / self.place.file).open("r+b") as file:
            file.seek(self.place.offset)
            seen = DigestingFile(file)
            is_lazy = isinstance(self.tensor, ir.LazyTensor)
            if hasattr(self.tensor, "tofile"):  # which onnx-ir does not ask of every tensor
                self.tensor.tofile(seen if is_lazy else file)  # to a file itself, stored bytes are copied by the system
            else:
                file.write(self.tensor.tobytes())
        drop_pages(self.tensor)
        return Outcome((seen.value(),) if is_lazy else ())


@dataclass(frozen=True)
class Plan:
    """All writes of a model.

    Attributes:
        sizes: name of each data file -> its bytes.
        writes: in the order in which their first tensors lie in the files.
    """

    sizes: Mapping[str, int]
    writes: tuple[Write, ...]

    def make_room(self, folder: Path) -> None:
        """Makes the data files in their full size; what lies in those that are there stays."""
        for name, size in self.sizes.items():
            with (folder / name).open("ab") as file:
                file.truncate(size)

    def stored(self, folder: Path) -> dict[int, ir.ExternalTensor]:
        """Returns id of each tensor -> the same tensor as the files hold it."""
        first = {id(piece.tensor): (piece.tensor, place) for piece, place in self._placed() if not piece.start}
        return {
            key: ir.ExternalTensor(
                *(place.file, place.offset, tensor.nbytes, tensor.dtype),
                shape=ir.Shape(tensor.shape.numpy()),
                name=tensor.name or "",
                base_dir=folder,
            )
            for key, (tensor, place) in first.items()
        }

    def digest(self) -> str:
        """Returns what equal plans have in common: what is written where, and how each weight is quantized."""
        digest = hashlib.blake2b(digest_size=16)
        for piece, place in self._placed():
            tensor = piece.tensor
            digest.update(repr((tensor.name, tensor.dtype.name, tuple(tensor.shape.numpy()), place)).encode())
        for job in (job for write in self.writes for job in write.jobs):
            digest.update(repr((job.context.weight, job.context.spec, str(job.context.scale_dtype))).encode())
        return digest.hexdigest()

    def _placed(self) -> Iterator[tuple[Piece, Range]]:
        return (pair for write in self.writes for pair in zip(write.pieces, write.ranges, strict=True))


def plan(slots: Sequence[Slot], name: Callable[[int, int], str], max_shard_size: int | None) -> Plan:
    """Lays tensors out in data files, one behind the other.

    Args:
        slots: in the order in which their tensors will lie. A tensor in two slots is written once.
        name: returns the name of a data file, of its index and how many there are.
        max_shard_size: bytes of each data file, or None for a single file.
    """
    shards = _shards(list({id(slot.tensor): slot.tensor for slot in slots}.values()), max_shard_size)
    sizes: dict[str, int] = {}
    placed: list[tuple[ir.TensorProtocol, Range]] = []
    for index, shard in enumerate(shards):
        file, offset = name(index, len(shards)), 0
        for tensor in shard:
            placed.append((tensor, Range(file, offset, tensor.nbytes)))
            offset += tensor.nbytes
        sizes[file] = offset
    return planned(sizes, placed)


def planned(sizes: Mapping[str, int], placed: Iterable[tuple[ir.TensorProtocol, Range]]) -> Plan:
    """Returns the writes of tensors whose places in files of these sizes are known; each lies in one place."""
    found: dict[int, list[tuple[ir.TensorProtocol, Range]]] = {}
    for tensor, place in placed:
        evaluation = tensor.parts if isinstance(tensor, PartTensor) and tensor.is_bytes else tensor
        found.setdefault(id(evaluation), []).append((tensor, place))
    return Plan(sizes, tuple(write for pairs in found.values() for write in _writes(pairs)))


def work(job: QuantizationJob) -> int:
    """Returns how many numbers are quantized quickly in the time that a weight takes."""
    is_quick = job.context.activations is None and job.quantizer in ALGORITHMS.values()
    return job.weight.size if is_quick else SLOWER * job.weight.size


def _writes(pairs: Sequence[tuple[ir.TensorProtocol, Range]]) -> Iterator[Write]:
    """Yields the writes of tensors that come from one evaluation: of a stack, one for so many of its weights."""
    tensor, place = pairs[0]
    if not (isinstance(tensor, PartTensor) and tensor.is_bytes):
        yield Write((Piece(tensor, 0, tensor.nbytes),), (place,), TensorTask(tensor, place))
        return
    jobs = tensor.jobs if tensor.stacked else tensor.jobs[:1]  # others are equal to the first
    some = max(1, STEP // work(jobs[0]))
    for first in range(0, len(jobs), some):
        own = jobs[first : first + some]
        pieces, ranges = [], []
        for part, whole in pairs:
            one = whole.length // len(jobs)
            pieces.append(Piece(part, first * one, len(own) * one))
            ranges.append(Range(whole.file, whole.offset + first * one, len(own) * one))
        indices = [part.index for part, _ in pairs if isinstance(part, PartTensor)]
        task = QuantizeTask(own, tensor.parts.stored, tuple(zip(indices, ranges, strict=True)))
        yield Write(tuple(pieces), tuple(ranges), task, own)


def _shards(tensors: Sequence[ir.TensorProtocol], most: int | None) -> list[list[ir.TensorProtocol]]:
    shards: list[list[ir.TensorProtocol]] = []
    room = -1
    for tensor in tensors:
        if not shards or (most is not None and tensor.nbytes > room):
            shards.append([])
            room = most or 0
        shards[-1].append(tensor)
        room -= tensor.nbytes
    return shards
