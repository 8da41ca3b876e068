"""External data: checked before a byte of it is read."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir

from rewriter.errors import ModelError
from rewriter.graph.contents import stored_tensors
from rewriter.tensors.mapped import MappedFile, MappedTensor

_READ = "rewriter.read"
_POINTER = 1024
"""Bytes that a Git LFS pointer does not exceed."""


def map_external_data(model: ir.Model, base_dir: Path) -> None:
    """Checks all external data of a model just read and replaces its tensors by :class:`MappedTensor`.

    Only file sizes are looked at; no data is read.

    Args:
        model: changed in place.
        base_dir: absolute directory of the model file, which its data may not leave.

    Raises:
        ModelError: data that is missing, truncated, of another length than the tensor's, or outside ``base_dir``.
    """
    files: dict[str, tuple[MappedFile, int]] = {}
    for slot in list(stored_tensors(model)):
        tensor = slot.tensor
        if isinstance(tensor, ir.ExternalTensor):
            location = os.fspath(tensor.location)
            if location not in files:
                files[location] = _open(slot.label, location, base_dir)
            file, size = files[location]
            _check_extent(slot.label, tensor, size)
            slot.put(MappedTensor(tensor, base_dir, file))
    model.meta[_READ] = tuple(file for file, _ in files.values())


def keep_external_data(model: ir.Model, copy: ir.Model) -> None:
    """Checks now that the data files of a model made elsewhere exist, since they are read only later.

    Args:
        model: made elsewhere.
        copy: of it; it knows the files from then on.

    Raises:
        ModelError: one is missing.
    """
    files: dict[str, MappedFile] = {}
    for slot in stored_tensors(model):
        tensor = slot.tensor
        if isinstance(tensor, ir.ExternalTensor) and os.fspath(tensor.path) not in files:
            try:
                files[os.fspath(tensor.path)] = MappedFile(Path(tensor.path))
            except OSError as error:
                if tensor.raw is None:
                    raise ModelError(
                        f"{slot.label}: there is no external data file '{tensor.path}'; put it back"
                    ) from error
    copy.meta[_READ] = model.meta.get(_READ, tuple(files.values()))


def require_unchanged(model: ir.Model) -> None:
    """Refuses a model whose data files were replaced, changed or removed since it was read.

    Raises:
        ModelError: names the file.
    """
    for file in model.meta.get(_READ, ()):
        file.require_unchanged()


def files_read(model: ir.Model) -> list[Path]:
    """Returns the data files of the model that was read."""
    return [file.path for file in model.meta.get(_READ, ())]


def data_names(model: ir.Model) -> set[str]:
    """Returns the names of the data files of a model, relative to its directory."""
    tensors = (slot.tensor for slot in stored_tensors(model))
    return {os.fspath(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}


def bytes_on_disk(file: Path | None, names: Iterable[str | Path]) -> int:
    """Returns the bytes of a model file and its data files, named from its directory on; 0 where there is none."""
    return 0 if file is None else sum((file.parent / name).stat().st_size for name in (file.name, *names))


def _open(label: str, location: str, base_dir: Path) -> tuple[MappedFile, int]:
    """Checks one data file; returns it with its size in bytes."""
    path = base_dir / location
    real = Path(os.path.realpath(path))
    inside = Path(os.path.normpath(path)).is_relative_to(os.path.normpath(base_dir)) and location != ""
    if not inside or not (real.is_relative_to(os.path.realpath(base_dir)) or _is_blob(real, base_dir)):
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
    if status.st_size < _POINTER and real.read_bytes().startswith(b"version https://git-lfs"):
        raise ModelError(f"{label}: its external data '{path}' is a Git LFS pointer: run git lfs pull")
    return MappedFile(real), status.st_size


def _is_blob(real: Path, base_dir: Path) -> bool:
    """Whether a link leads where the Hugging Face cache keeps the files of this very repository.

    There, ``REPOSITORY/snapshots/REVISION/...`` holds links into ``REPOSITORY/blobs``.
    """
    repositories = (above.parent.parent for above in (base_dir, *base_dir.parents) if above.parent.name == "snapshots")
    return real.parent in {Path(os.path.realpath(repository / "blobs")) for repository in repositories}


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
