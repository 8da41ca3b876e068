"""Tensors on their way into a message: read or computed, several at once; and a meter of what is done."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx_ir as ir

from rewriter.graph.contents import Slot
from rewriter.io.verify import Digests
from rewriter.tensors import drop_pages
from rewriter.tensors.digest import digest_of

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
    slots: Sequence[Slot], meter: Meter, workers: int, digests: Digests
) -> Iterator[tuple[Slot, ir.TensorProtocol]]:
    """Yields the slots whose tensor is lazy or on disk, with the tensor read or computed; others stay as they are.

    ``digests`` takes that of each lazy tensor.
    """
    absent = [slot for slot in slots if isinstance(slot.tensor, ir.LazyTensor | ir.ExternalTensor)]

    def read(slot: Slot) -> ir.TensorProtocol:
        tensor = ir.Tensor(np.array(slot.tensor.numpy()), dtype=slot.tensor.dtype, name=slot.tensor.name)
        if isinstance(slot.tensor, ir.LazyTensor):
            digests.add(slot.tensor, 0, tensor.nbytes, digest_of(tensor.tobytes()))
        drop_pages(slot.tensor)
        meter.add(tensor.nbytes)
        return tensor

    meter.add(sum(slot.tensor.nbytes for slot in slots) - sum(slot.tensor.nbytes for slot in absent))
    pool = ThreadPoolExecutor(max_workers=workers)
    try:
        yield from zip(absent, pool.map(read, absent), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)
