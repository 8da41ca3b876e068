"""Planned writes: where every tensor will lie is known before any weight is read.

A write is all tensors that come from one evaluation, as the codes and scales of a weight do, and the range of a data
file for each. It needs nothing of any other write, and made twice it leaves the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import onnx_ir as ir

from rewriter.graph.contents import Slot
from rewriter.quantize.job import PartTensor, QuantizationJob
from rewriter.quantize.measured import Measured
from rewriter.tensors import drop_pages
from rewriter.tensors.digest import DigestingFile, digest_of_range


@dataclass(frozen=True)
class Range:
    """A part of a data file: its name in the folder, and bytes."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Outcome:
    """What is known of a write that was made.

    Attributes:
        digests: of the bytes of each tensor; empty where nothing was computed.
        measured: what became of each weight.
    """

    digests: tuple[bytes, ...] = ()
    measured: tuple[Measured, ...] = ()


@dataclass(frozen=True, eq=False)
class Write:
    """A planned write.

    Attributes:
        tensors: what comes from one evaluation, in its order.
        ranges: where each of them will lie.
    """

    tensors: tuple[ir.TensorProtocol, ...]
    ranges: tuple[Range, ...]

    @property
    def name(self) -> str:
        """Name of the first tensor."""
        return self.tensors[0].name or ""

    @property
    def jobs(self) -> tuple[QuantizationJob, ...]:
        """The weights that are quantized for it."""
        first = self.tensors[0]
        if not isinstance(first, PartTensor):
            return ()
        return first.jobs if first.stacked else first.jobs[:1]  # others are equal to the first

    @property
    def is_computed(self) -> bool:
        """Whether anything is computed for it; else it is a copy of stored bytes."""
        return isinstance(self.tensors[0], ir.LazyTensor)

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def perform(self, folder: Path) -> Outcome:
        """Computes the tensors and writes them into files that are there, in their full size."""
        digests = []
        for tensor, place in zip(self.tensors, self.ranges, strict=True):
            with (folder / place.file).open("r+b") as file:
                file.seek(place.offset)
                digests.append(_written(tensor, file))
            drop_pages(tensor)
        if not self.is_computed:
            return Outcome()
        return Outcome(tuple(digests), tuple(job.measured for job in self.jobs if job.measured is not None))

    def lies_in(self, folder: Path, outcome: Outcome) -> bool:
        """Whether a folder holds the bytes that an earlier run noted."""
        try:
            found = [digest_of_range(folder / place.file, place.offset, place.length) for place in self.ranges]
        except OSError:
            return False
        return found == list(outcome.digests) and len(outcome.measured) == len(self.jobs)


def digest_computed(tensor: ir.TensorProtocol, seen: Callable[[], bytes]) -> bytes:
    """Returns the digest of a computed tensor: its job's own, taken before anything was written, or what was seen."""
    return tensor.digest() if isinstance(tensor, PartTensor) and tensor.is_digested else seen()


def _written(tensor: ir.TensorProtocol, file: IO[bytes]) -> bytes:
    seen = DigestingFile(file)
    is_seen = isinstance(tensor, ir.LazyTensor) and not (isinstance(tensor, PartTensor) and tensor.is_digested)
    if hasattr(tensor, "tofile"):  # which onnx-ir does not ask of every tensor
        tensor.tofile(seen if is_seen else file)  # to a file itself, stored bytes are copied by the system
    else:
        file.write(tensor.tobytes())
    return digest_computed(tensor, seen.value)


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
        return {
            id(tensor): ir.ExternalTensor(
                *(place.file, place.offset, place.length, tensor.dtype),
                shape=ir.Shape(tensor.shape.numpy()),
                name=tensor.name or "",
                base_dir=folder,
            )
            for write in self.writes
            for tensor, place in zip(write.tensors, write.ranges, strict=True)
        }

    def digest(self) -> str:
        """Returns what equal plans have in common: what is written where, and how each weight is quantized."""
        digest = hashlib.blake2b(digest_size=16)
        for write in self.writes:
            forms = [(tensor.name, tensor.dtype.name, tuple(tensor.shape.numpy())) for tensor in write.tensors]
            jobs = [(job.context.weight, job.context.spec, str(job.context.scale_dtype)) for job in write.jobs]
            digest.update(repr((forms, write.ranges, jobs)).encode())
        return digest.hexdigest()


def plan(slots: Sequence[Slot], name: Callable[[int, int], str], max_shard_size: int | None) -> Plan:
    """Lays tensors out in data files, one behind the other.

    Args:
        slots: in the order in which their tensors will lie. A tensor in two slots is written once.
        name: returns the name of a data file, of its index and how many there are.
        max_shard_size: bytes of each data file, or None for a single file.
    """
    shards = _shards(list({id(slot.tensor): slot.tensor for slot in slots}.values()), max_shard_size)
    sizes: dict[str, int] = {}
    found: dict[int, list[tuple[ir.TensorProtocol, Range]]] = {}
    for index, shard in enumerate(shards):
        file, offset = name(index, len(shards)), 0
        for tensor in shard:
            evaluation = tensor.parts if isinstance(tensor, PartTensor) else tensor
            found.setdefault(id(evaluation), []).append((tensor, Range(file, offset, tensor.nbytes)))
            offset += tensor.nbytes
        sizes[file] = offset
    return Plan(sizes, tuple(Write(*zip(*pairs, strict=True)) for pairs in found.values()))


def carry_out(
    writes: Sequence[Write], folder: Path, pool: Executor, *, at_once: int, memory: int
) -> Iterator[tuple[Write, Outcome]]:
    """Makes writes, and yields each with its outcome as soon as it is made.

    Args:
        writes: begun in this order.
        folder: holds the data files.
        pool: what runs them.
        at_once: how many it is given at a time.
        memory: bytes of computed tensors in flight at once; one larger write is let through alone.
    """
    running: dict[Future[Outcome], tuple[Write, int]] = {}

    def done() -> Iterator[tuple[Write, Outcome]]:
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            write, _ = running.pop(future)
            yield write, future.result()

    try:
        for write in writes:
            size = min(write.nbytes, memory) if write.is_computed else 0
            while running and (len(running) >= at_once or sum(held for _, held in running.values()) + size > memory):
                yield from done()
            running[pool.submit(partial(write.perform, folder))] = write, size
        while running:
            yield from done()
    finally:
        for future in running:
            future.cancel()


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
