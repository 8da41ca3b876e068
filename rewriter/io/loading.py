"""Load models: their weights stay on disk until they are read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir

from rewriter.errors import ModelError
from rewriter.graph.contents import Body
from rewriter.io.external import keep_external_data, map_external_data
from rewriter.io.messages import from_proto, list_no_initializers, name_standard_domain
from rewriter.io.reading import model_file, read_proto
from rewriter.io.validate import validate
from rewriter.memory import require_addresses

_SOURCE = "rewriter.source"


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Reads a model; its external data is checked but stays on disk, mapped when it is first read.

    Nodes that are not in topological order are put in one, in memory.

    Args:
        path: an ``.onnx`` file, or a directory that holds exactly one.

    Raises:
        ModelError: no such file, not ONNX, an invalid graph, or external data that is missing, truncated or outside
            the model's directory.
        MemoryError: ``ulimit -v`` leaves too little for what would be done with it.
    """
    require_addresses()
    file = model_file(Path(path))
    proto = read_proto(file)
    with _located(file):
        model = from_proto(proto, own=True)
        map_external_data(model, file.parent)
        _sort(validate(model))
    model.meta[_SOURCE] = file
    return model


def parsed(proto: onnx.ModelProto) -> ir.Model:
    """Returns the model of a message, its nodes in topological order.

    A message does not say where it was read from: external data is looked for in the working directory.

    Raises:
        ModelError: an invalid graph, or external data that is not there.
    """
    model = from_proto(proto)
    try:
        map_external_data(model, Path.cwd())
    except ModelError as error:
        raise ModelError(f"{error}; or give the path of the model, which says where its data are") from error
    _sort(validate(model))
    return model


def copied(model: ir.Model) -> ir.Model:
    """Returns a model with graphs of its own and the same tensors.

    Raises:
        ModelError: an invalid graph, one whose nodes are not in topological order, or external data that is not there.
    """
    if validate(model):
        raise ModelError("the model's nodes are in no topological order; call model.graph.sort()")
    copy = model.clone()
    keep_external_data(model, copy)
    name_standard_domain(copy)
    list_no_initializers(copy)
    return copy


def source_path(model: ir.Model) -> Path | None:
    """Returns the absolute path of the file that the model was loaded from, or None."""
    found = model.meta.get(_SOURCE)
    return found if isinstance(found, Path) else None


@contextlib.contextmanager
def _located(file: Path) -> Iterator[None]:
    """Puts the model's path in front of an error message."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"'{file}': {error}") from error


def _sort(unsorted: list[Body]) -> None:
    for body in unsorted:
        body.sort()
