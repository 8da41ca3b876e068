"""Load models: their weights stay on disk until they are read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from rewriter.errors import ModelError
from rewriter.io.external import map_external_data
from rewriter.io.reading import from_proto, model_file, read_proto
from rewriter.io.validate import is_sorted, validate
from rewriter.stored import subgraphs

_SOURCE = "rewriter.source"


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Reads a model; its external data is checked but stays on disk, mapped when it is first read.

    Nodes that are not in topological order are put in one, in memory.

    Args:
        path: an ``.onnx`` file, or a directory that holds exactly one.

    Raises:
        ModelError: no such file, not ONNX, an invalid graph, or external data that is missing, truncated or outside
            the model's directory.
    """
    file = model_file(Path(path))
    proto = read_proto(file)
    with _located(file):
        model = from_proto(proto)
        map_external_data(model, file.parent)
        validate(model)
    _sort(model)
    model.meta[_SOURCE] = file
    return model


def source_path(model: ir.Model) -> Path | None:
    """Returns the absolute path of the file that the model was loaded from, or None."""
    found = model.meta.get(_SOURCE)
    return found if isinstance(found, Path) else None


@contextlib.contextmanager
def _located(file: Path) -> Iterator[None]:
    """Puts the model's path before what is wrong with it; a damaged file's names may hold anything."""
    try:
        yield
    except ModelError as error:
        text = "".join(c if c.isprintable() else "?" for c in str(error))
        raise ModelError(f"'{file}': {text}") from error


def _sort(model: ir.Model) -> None:
    bodies: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for body in bodies:
        nested = [g for node in ir.traversal.RecursiveGraphIterator(body) for g in subgraphs(node)]
        if not all(map(is_sorted, [body, *nested])):
            body.sort()
