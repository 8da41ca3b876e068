"""Tensors in data files: mapped once per file, and dropped from memory when consumed.

Few files are mapped at a time: some exporters write a file for each tensor, more than a process may have open.
"""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
import os
import threading
import weakref
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from rewriter.errors import ModelError
from rewriter.tensors.view import Array, View, ViewTensor, is_in_rows

MAPPED = 128
"""Files that are mapped at a time, each of which is open as long: systems allow a process 256 or more."""

_FILES: deque[weakref.ref[MappedFile]] = deque()
"""The files that are mapped, in the order in which they were."""


class Map(mmap.mmap):
    """A mapped file that knows which, so that another process can map it too, and need not be sent what it holds.

    Attributes:
        source: path of the file; its bytes and time of change when it was mapped.
    """

    source: tuple[Path, tuple[int, ...]]


class MappedFile:
    """One data file, mapped when the first tensor in it is read; it must stay as it was when this was made."""

    def __init__(self, path: Path, known: tuple[int, ...] = ()) -> None:
        """Keeps what the file is now, or what it was where another process opened it: bytes, and time of change."""
        self.path = path
        self._before = known or _state(path.stat())
        self._lock = threading.Lock()
        self._map: Map | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the file anew, if it sees the same one; each file once."""
        return _opened, (self.path, self._before[-2:])

    def map(self) -> Map:
        with self._lock:
            if self._map is None:
                with self.path.open("rb") as file:
                    if not self._is(os.fstat(file.fileno())):
                        raise self._changed()
                    # Weights are read once or twice; what is written, to be read back, may have their place in memory.
                    with contextlib.suppress(OSError, AttributeError):
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_NOREUSE)
                    self._map = Map(file.fileno(), 0, access=mmap.ACCESS_READ)
                self._map.source = self.path, self._before[-2:]
                _FILES.append(weakref.ref(self))
            found = self._map
        while len(_FILES) > MAPPED:
            if (first := _FILES.popleft()()) is not None:
                first.close()
        return found

    def close(self) -> None:
        """Closes the file as soon as no array shows it any more; it is mapped anew when it is read again."""
        with self._lock:
            self._map = None

    def drop(self, start: int, stop: int) -> None:
        """Takes the pages of bytes [start, stop) out of memory."""
        mapped = self._map
        if mapped is not None:
            _drop(mapped, start, stop)

    def require_unchanged(self) -> None:
        """Refuses a file that was replaced, changed or removed since this was made: what was read may be of two files.

        Raises:
            ModelError: names it.
        """
        try:
            same = self._is(self.path.stat())
        except OSError:
            same = False
        if not same:
            raise self._changed()

    def _is(self, status: os.stat_result) -> bool:
        return _state(status)[-len(self._before) :] == self._before

    def _changed(self) -> ModelError:
        return ModelError(
            f"the data file '{self.path}' was changed while it was read; run again when nothing writes it"
        )


@functools.lru_cache(64)
def _opened(path: Path, known: tuple[int, ...]) -> MappedFile:
    """A file that another process has opened; numbers of devices and inodes may differ by machine."""
    return MappedFile(path, known)


def _state(status: os.stat_result) -> tuple[int, int, int, int]:
    """What tells a file from another in its place, or from what it was."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class MappedTensor(ir.ExternalTensor):
    """A tensor in a data file whose mapping all the file's tensors share.

    onnx-ir maps the whole file anew for each tensor: ten thousand tensors of a 50 GB file exhaust the address space.
    """

    def __init__(self, tensor: ir.ExternalTensor, base_dir: Path, file: MappedFile) -> None:
        super().__init__(
            tensor.location,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=tensor.name,
            doc_string=tensor.doc_string,
            metadata_props=dict(tensor.metadata_props),
            base_dir=base_dir,
        )
        self._file = file

    def __reduce__(self) -> tuple[Any, ...]:
        """Where the elements lie, and none of them."""
        plain = (self.location, self.offset, self.length, self.dtype, tuple(self.shape.numpy()), self.name)
        return _mapped, (*plain, Path(self.base_dir), self._file)

    def numpy(self) -> Array:
        """Returns the elements, straight from the mapped file (unpacked where they are narrower than a byte)."""
        shape = self.shape.numpy()
        if not (size := math.prod(shape)):
            return np.empty(shape, self.dtype.numpy())
        start = self.offset or 0
        if self.dtype.bitwidth < 8:
            packed = np.frombuffer(self._file.map(), np.uint8, self.nbytes, start)
            return np.asarray(ir.PackedTensor(packed, self.dtype, shape=shape).numpy())
        little = np.dtype(self.dtype.numpy()).newbyteorder("<")
        return np.frombuffer(self._file.map(), little, size, start).reshape(shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.asarray(self.numpy(), dtype=dtype)

    def tobytes(self) -> bytes:
        """Returns a copy of the stored bytes."""
        start = self.offset or 0
        return self._file.map()[start : start + self.nbytes] if self.size else b""

    def drop(self, start: int, stop: int) -> None:
        """Gives the pages of bytes [start, stop) back to the system; reading them again maps them again."""
        origin = self.offset or 0
        self._file.drop(origin + start, origin + stop)


def _mapped(
    location: str,
    offset: int | None,
    length: int | None,
    dtype: ir.DataType,
    shape: tuple[int, ...],
    name: str,
    base_dir: Path,
    file: MappedFile,
) -> MappedTensor:
    tensor = ir.ExternalTensor(location, offset, length, dtype, shape=ir.Shape(shape), name=name, base_dir=base_dir)
    return MappedTensor(tensor, base_dir, file)


def drop_pages(source: ir.TensorProtocol | View) -> None:
    """Takes what ``source`` shows of a mapped file out of this process' resident memory.

    Nothing is lost: a later read faults the pages in again. A tensor that is not mapped is left alone, and so is
    everything on a system without ``madvise``.

    Args:
        source: a tensor, or a view: only the bytes between its first and its last element are dropped.
    """
    if isinstance(source, View):
        held = source.source
        if source.size and is_in_rows(held):
            for view in held.shown(*held.shown_rows(source)):
                drop_pages(view)
        elif source.size:
            low, high = source.span
            bits = held.dtype.bitwidth
            _drop_part(held, low * bits // 8, -(-(high + 1) * bits // 8))
    elif isinstance(source, ViewTensor):
        drop_pages(source.view)
    elif is_in_rows(source):
        for view in source.shown(0, int(source.shape.numpy()[0])):
            drop_pages(view)
    else:
        _drop_part(source, 0, source.nbytes)


def _drop_part(tensor: ir.TensorProtocol, start: int, stop: int) -> None:
    if type(tensor) is MappedTensor:
        tensor.drop(start, stop)
    elif isinstance(tensor, ir.ExternalTensor) and tensor.raw is not None:
        origin = tensor.offset or 0
        _drop(tensor.raw, origin + start, origin + stop)


def _drop(mapped: mmap.mmap, start: int, stop: int) -> None:
    start -= start % mmap.PAGESIZE
    if hasattr(mapped, "madvise") and start < stop:
        mapped.madvise(mmap.MADV_DONTNEED, start, min(stop, len(mapped)) - start)
