"""Tensors on their way to disk: computed as they are written, several at once, and dropped."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from rewriter.graph.contents import Slot
from rewriter.quantize.job import PartTensor
from rewriter.tensors import drop_pages
from rewriter.tensors.digest import DigestingFile, digest_of

Progress = Callable[[int, int], None]


class Meter:
    """Counts bytes done, for whoever wants to know."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total = total
        self._progress = progress
        self._done = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """Counts ``count`` more bytes; from any thread."""
        with self._lock:
            self._done += count
            if self._progress is not None:
                self._progress(self._done, self._total)


def in_memory(
    slots: Sequence[Slot], meter: Meter, workers: int, digests: dict[int, bytes]
) -> Iterator[tuple[Slot, ir.TensorProtocol]]:
    """Yields the slots whose tensor is lazy or on disk, with the tensor read or computed; others stay as they are.

    ``digests`` takes, by the id of each lazy tensor, the digest of what was computed.
    """
    absent = [slot for slot in slots if isinstance(slot.tensor, ir.LazyTensor | ir.ExternalTensor)]

    def read(slot: Slot) -> ir.TensorProtocol:
        tensor = ir.Tensor(np.array(slot.tensor.numpy()), dtype=slot.tensor.dtype, name=slot.tensor.name)
        if isinstance(slot.tensor, ir.LazyTensor):
            digests[id(slot.tensor)] = digest_of(tensor.tobytes())
        drop_pages(slot.tensor)
        meter.add(tensor.nbytes)
        return tensor

    meter.add(sum(slot.tensor.nbytes for slot in slots) - sum(slot.tensor.nbytes for slot in absent))
    pool = ThreadPoolExecutor(max_workers=workers)
    try:
        yield from zip(absent, pool.map(read, absent), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def on_disk(
    slots: Sequence[Slot],
    directory: Path,
    name: Callable[[int, int], str],
    *,
    meter: Meter,
    memory: int,
    workers: int,
    max_shard_size: int | None,
    digests: dict[int, bytes],
) -> Iterator[tuple[Slot, ir.TensorProtocol]]:
    """Writes the tensors of ``slots`` into data files; yields each slot with the external tensor that was written.

    Args:
        slots: in the order in which they will lie in the file. A tensor in two slots is written once.
        directory: where the data files go.
        name: returns the name of a data file, of its index and how many there are.
        meter: counts what is written.
        memory: bytes of computed tensors in flight.
        workers: threads.
        max_shard_size: bytes of each data file, or None for a single file.
        digests: takes, by the id of each lazy tensor, the digest of what was written.
    """
    sources = {id(slot.tensor): slot.tensor for slot in slots}
    shards = _shards(list(sources.values()), max_shard_size)
    written: dict[int, ir.ExternalTensor] = {}
    for index, shard in enumerate(shards):
        external = ir.external_data.convert_tensors_to_external(
            [_Metered(tensor, meter, digests) for tensor in shard],
            directory,
            name(index, len(shards)),
            max_workers=workers,
            max_in_flight_bytes=memory,
        )
        written |= {id(tensor): stored for tensor, stored in zip(shard, external, strict=True)}
    for slot in slots:
        yield slot, written[id(slot.tensor)]


def largest_file(slots: Sequence[Slot], max_shard_size: int | None) -> int:
    """Returns the bytes of the largest data file that ``on_disk`` will write, but for what lies between tensors."""
    tensors = list({id(slot.tensor): slot.tensor for slot in slots}.values())
    return max((sum(tensor.nbytes for tensor in shard) for shard in _shards(tensors, max_shard_size)), default=0)


class _Metered(ir.LazyTensor):
    """A tensor that is counted, and its mapped source dropped from memory, once it is written."""

    def __init__(self, tensor: ir.TensorProtocol, meter: Meter, digests: dict[int, bytes]) -> None:
        super().__init__(lambda: tensor, tensor.dtype, ir.Shape(tensor.shape.numpy()), name=tensor.name)
        self._meter = meter
        self._digests = digests

    def tofile(self, file: Any) -> None:
        tensor = self.raw()
        if isinstance(tensor, ir.LazyTensor) and not (isinstance(tensor, PartTensor) and tensor.is_digested):
            digesting = DigestingFile(file)
            super().tofile(digesting)
            self._digests[id(tensor)] = digesting.value()
        else:
            super().tofile(file)
        drop_pages(self.raw())
        self._meter.add(self.nbytes)


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
