"""External data: checked before a byte is read, mapped once per file, and dropped from memory when consumed."""

from __future__ import annotations

import dataclasses
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from rewriter.errors import ModelError
from rewriter.rows import RowsTensor
from rewriter.tensors import Array, View, ViewTensor

Undo = Callable[[], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Slot:
    """A place in a model that holds a tensor.

    Attributes:
        owner: the value of an initializer, or the node of an attribute.
        key: name of the initializer or attribute.
        tensor: what was there when the slot was found.
    """

    owner: ir.Value | ir.Node
    key: str
    tensor: ir.TensorProtocol

    @property
    def label(self) -> str:
        """How messages name the slot."""
        if isinstance(self.owner, ir.Value):
            return f"initializer '{self.key}'"
        return f"attribute '{self.key}' of node '{self.owner.name or ''}' ({self.owner.op_type})"

    def put(self, tensor: ir.TensorProtocol) -> Undo:
        """Puts another tensor there; returns what puts the old one back."""
        owner = self.owner
        if isinstance(owner, ir.Value):
            before = owner.const_value
            owner.const_value = tensor
            return lambda: setattr(owner, "const_value", before)
        attribute = owner.attributes[self.key]
        owner.attributes[self.key] = ir.AttrTensor(self.key, tensor, doc_string=attribute.doc_string)
        return lambda: owner.attributes.update({self.key: attribute})


class _File:
    """One data file, mapped when the first tensor in it is read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._map: mmap.mmap | None = None

    def map(self) -> mmap.mmap:
        with self._lock:
            if self._map is None:
                with self._path.open("rb") as file:
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return self._map

    def drop(self, start: int, stop: int) -> None:
        if self._map is not None:
            _drop(self._map, start, stop)


class MappedTensor(ir.ExternalTensor):
    """A tensor in a data file whose mapping all the file's tensors share.

    onnx-ir maps the whole file anew for each tensor: ten thousand tensors of a 50 GB file exhaust the address space.
    """

    def __init__(self, tensor: ir.ExternalTensor, base_dir: Path, file: _File) -> None:
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

    def numpy(self) -> Array:
        """Returns the elements, straight from the mapped file (unpacked where they are narrower than a byte)."""
        shape = tuple(int(d) for d in self.shape.numpy())
        if not self.size:
            return np.empty(shape, self.dtype.numpy())
        start = self.offset or 0
        if self.dtype.bitwidth < 8:
            packed = np.frombuffer(self._file.map(), np.uint8, self.nbytes, start)
            return np.asarray(ir.PackedTensor(packed, self.dtype, shape=shape).numpy())
        little = np.dtype(self.dtype.numpy()).newbyteorder("<")
        return np.frombuffer(self._file.map(), little, self.size, start).reshape(shape)

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


def drop_pages(source: ir.TensorProtocol | View) -> None:
    """Takes what ``source`` shows of a mapped file out of this process' resident memory.

    Nothing is lost: a later read faults the pages in again. A tensor that is not mapped is left alone, and so is
    everything on a system without ``madvise``.

    Args:
        source: a tensor, or a view: only the bytes between its first and its last element are dropped.
    """
    for tensor, start, stop in _extents(source):
        if isinstance(tensor, MappedTensor):
            tensor.drop(start, stop)
        elif isinstance(tensor, ir.ExternalTensor) and tensor.raw is not None:
            origin = tensor.offset or 0
            _drop(tensor.raw, origin + start, origin + stop)


def stored_tensors(model: ir.Model) -> Iterator[Slot]:
    """Yields every tensor that the model holds, in the order of the model.

    Initializers of the main graph and of every subgraph come first, then tensor attributes, functions included.
    """
    nodes = list(all_nodes(model))
    graphs = [model.graph, *(g for node in nodes for g in subgraphs(node))]
    for graph in graphs:
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                yield Slot(value, name, value.const_value)
    for node in nodes:
        for attribute in tuple(node.attributes.values()):
            if not attribute.is_ref() and attribute.type == ir.AttributeType.TENSOR:
                yield Slot(node, attribute.name, attribute.value)


def total_bytes(model: ir.Model) -> int:
    """Returns the bytes of all stored tensors, as they will be written."""
    return sum(slot.tensor.nbytes for slot in stored_tensors(model))


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Yields the nodes of the main graph, of functions, and of all their subgraphs."""
    bodies: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for body in bodies:
        yield from ir.traversal.RecursiveGraphIterator(body)


def subgraphs(node: ir.Node) -> list[ir.Graph]:
    """Returns the bodies that the node holds (of If, Loop, Scan ...)."""
    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            found.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            found.extend(attribute.as_graphs())
    return found


def map_external_data(model: ir.Model, base_dir: Path) -> None:
    """Checks all external data of a model just read and replaces its tensors by :class:`MappedTensor`.

    Only file sizes are looked at; no data is read.

    Args:
        model: changed in place.
        base_dir: absolute directory of the model file, which its data may not leave.

    Raises:
        ModelError: data that is missing, truncated, of another length than the tensor's, or outside ``base_dir``.
    """
    files: dict[str, tuple[_File, int]] = {}
    for slot in list(stored_tensors(model)):
        tensor = slot.tensor
        if isinstance(tensor, ir.ExternalTensor):
            location = os.fspath(tensor.location)
            if location not in files:
                files[location] = _open(slot.label, location, base_dir)
            file, size = files[location]
            _check_extent(slot.label, tensor, size)
            slot.put(MappedTensor(tensor, base_dir, file))


def _open(label: str, location: str, base_dir: Path) -> tuple[_File, int]:
    """Checks one data file; returns it with its size in bytes."""
    path = base_dir / location
    real = Path(os.path.realpath(path))
    inside = Path(os.path.normpath(path)).is_relative_to(os.path.normpath(base_dir)) and location != ""
    if not inside or not real.is_relative_to(os.path.realpath(base_dir)):
        how = f", a link to '{real}'," if inside else ""
        raise ModelError(
            f"{label}: its external data '{location}'{how} is outside the model's directory '{base_dir}';"
            " copy the data file itself beside the model (hf download --local-dir does)"
        )
    try:
        status = real.stat()
    except OSError as error:
        raise ModelError(
            f"{label}: its external data file '{path}' cannot be read ({error.strerror}); put it beside the model"
        ) from error
    if not real.is_file():
        raise ModelError(f"{label}: its external data '{path}' is not a regular file")
    if status.st_nlink > 1:
        raise ModelError(
            f"{label}: its external data file '{path}' has {status.st_nlink} hard links, which onnx-ir refuses"
            f" to read; replace it by a copy of its own (cp '{path}' copy && mv copy '{path}')"
        )
    return _File(real), status.st_size


def _check_extent(label: str, tensor: ir.ExternalTensor, size: int) -> None:
    offset, needed = tensor.offset or 0, tensor.nbytes
    if tensor.dtype == ir.DataType.STRING:
        raise ModelError(f"{label}: strings cannot be external data; export the model again")
    if tensor.length is not None and tensor.length != needed:
        what = f"{tensor.dtype.name}{list(tensor.shape.numpy())}"
        raise ModelError(
            f"{label}: {what} takes {needed:,} bytes, but its external data says {tensor.length:,};"
            " export the model again"
        )
    if offset + needed > size:
        raise ModelError(
            f"{label}: external data file '{tensor.location}' is truncated: it has {size:,} bytes, and bytes"
            f" {offset:,} to {offset + needed:,} are needed; download or export it again"
        )


def _extents(source: ir.TensorProtocol | View) -> Iterator[tuple[ir.TensorProtocol, int, int]]:
    """The stored tensors behind ``source``, each with the byte range of it that ``source`` reads."""
    if isinstance(source, ViewTensor):
        yield from _extents(source.view)
    elif isinstance(source, RowsTensor):
        for view in source.shown(0, int(source.shape.numpy()[0])):
            yield from _extents(view)
    elif not isinstance(source, View):
        yield source, 0, source.nbytes
    elif isinstance(source.source, RowsTensor):
        first, count = source.source_rows if source.size else (0, 0)
        for view in source.source.shown(first, count):
            yield from _extents(view)
    elif source.size:
        low, high = source.span
        bits = source.source.dtype.bitwidth
        yield source.source, low * bits // 8, -(-(high + 1) * bits // 8)


def _drop(mapped: mmap.mmap, start: int, stop: int) -> None:
    start -= start % mmap.PAGESIZE
    if hasattr(mapped, "madvise") and start < stop:
        mapped.madvise(mmap.MADV_DONTNEED, start, min(stop, len(mapped)) - start)
