"""Save models: weights are read, computed and written one by one, and output appears complete or not at all."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from rewriter.errors import ModelError, UsageError, root_cause
from rewriter.graph.contents import Slot, stored_tensors, swapped, total_bytes
from rewriter.io.beside import data_of, others_of
from rewriter.io.external import files_read, require_unchanged
from rewriter.io.identity import code, files
from rewriter.io.inline import Absent, inlined, with_room
from rewriter.io.journal import require_same
from rewriter.io.leftovers import taken
from rewriter.io.loading import source_path
from rewriter.io.making import Threads, made
from rewriter.io.output import complete_directory
from rewriter.io.place import Place
from rewriter.io.streaming import Meter, Progress, in_memory
from rewriter.io.verify import Digests, verify
from rewriter.io.writes import Plan, plan
from rewriter.memory import available
from rewriter.process import processors
from rewriter.tensors import ViewTensor
from rewriter.text import nbytes

if TYPE_CHECKING:
    from distributed import Client

SINGLE_FILE_BYTES = 256 << 20
"""A model whose tensors take no more is one ``.onnx`` file: far below protobuf's 2 GB, and small beside any budget."""

INLINE_BYTES = 1024
"""A tensor that takes no more stays in the ``.onnx`` file: shapes, axes and scalars, which runtimes read at load."""

DEFAULT_MEMORY = 512 << 20
"""Bytes of computed tensors in flight while saving."""

_SHARE = 3
"""A third of the memory that is left is for computed tensors: what computes them takes as much again."""

_PROTOBUF_LIMIT = (1 << 31) - 1


def save(
    model: ir.Model,
    directory: str | os.PathLike[str] | Place,
    *,
    name: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    identity: Mapping[str, str] | None = None,
    cluster: Client | None = None,
    memory: int | None = None,
    max_workers: int | None = None,
    max_shard_size: int | None = None,
    data_name: str | None = None,
    progress: Progress | None = None,
    copy_others_from: str | os.PathLike[str] | None = None,
    inspect: Callable[[Sequence[Slot], ir.Model], None] | None = None,
) -> Path:
    """Writes a model into a directory of its own, tensor by tensor; the same model gives the same bytes.

    A model of more than ``SINGLE_FILE_BYTES``, or with ``max_shard_size``, keeps its tensors in data files. Lazy
    tensors are computed as they are written, in the order of the initializers, and never kept; what they raise comes
    through as it is. The model is unchanged afterwards, and so is everything on disk unless all of it was written.

    Args:
        model: what to write.
        directory: the output; it must not exist, be empty, or ``overwrite`` given. Or the place, looked at before.
        name: file name of the model; by default the place's, or ``model.onnx``.
        overwrite: replace files of the same names, and the data files that only the replaced model names, once the new
            output is complete; nothing else in the directory is touched.
        resume: go on where a run that was killed ended, if it was of the same ``identity``: what it wrote into data
            files is read and held to its digests, and not computed again. An interrupted run leaves what it wrote.
        identity: what decides the bytes of the weights, beside the input's data files, in words; None where nobody can
            say, as for a model in memory: such a run cannot be resumed.
        cluster: of dask; its workers quantize, copy and read back what lies in data files, if they see these.
        memory: bytes of computed tensors in flight at once; one larger tensor is let through alone.
        max_workers: threads that compute and write; all processors by default.
        max_shard_size: bytes of each data file; one file by default.
        data_name: of the data file, as ``model.onnx_data``; further ones are ``model.onnx_data_1`` and so on, as
            transformers.js looks for them. There is a data file then, however small the model is. By default
            ``<name>.data``, and of several ``<name>-<i>-of-<n>.data``.
        progress: called with bytes written and bytes in all, by one thread at a time.
        copy_others_from: an input model file: the other files in its directory (tokenizer, configuration) are copied,
            folders are not; other models only where a ``genai_config.json`` says that they belong together.
        inspect: shown the tensors that were written and the model read back, before it appears.

    Returns:
        Path of the written ``.onnx`` file.

    Raises:
        UsageError: the output exists, holds the input, or cannot be written; or the run that was killed was of another
            identity.
        ModelError: the model is too large for the ``.onnx`` format, or its data changed while they were read.
        ParityError: what was written is not what was computed.
    """
    workers = max_workers if max_workers is not None else processors()
    budget = DEFAULT_MEMORY if memory is None else memory
    for value, what in ((workers, "max_workers"), (budget, "memory"), (max_shard_size, "max_shard_size")):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise UsageError(f"{what} must be a positive integer, not {value!r}")
    place = directory if isinstance(directory, Place) else Place.of(directory, overwrite=overwrite, resume=resume)
    name = name or place.name or "model.onnx"
    if Path(name).name != name or name in ("", ".", ".."):
        raise UsageError(f"the model's file name '{name}' must be a plain name, as model.onnx")
    if data_name is not None and (Path(data_name).name != data_name or data_name in ("", ".", "..", name)):
        raise UsageError(f"the data file's name '{data_name}' must be a plain name, as {name}_data")
    total = total_bytes(model)
    others = others_of(Path(copy_others_from), name, data_name) if copy_others_from is not None else []
    single = total <= SINGLE_FILE_BYTES and max_shard_size is None and data_name is None
    slots = list(stored_tensors(model))
    streamed = inlined(model, slots) if single else [slot for slot in slots if _is_streamed(slot)]
    planned = plan([] if single else streamed, functools.partial(_data_file, name, data_name), max_shard_size)
    require_unchanged(model)
    place.require_without(_inputs(model), (name, *planned.sizes, *(other.name for other in others)))
    known = _identity(model, planned, identity, resumed=place.resume) if planned.writes or place.resume else None
    leftover = place.leftover(name)
    if leftover is not None and known is not None:
        require_same(leftover, known)
    place.require_room(total - (0 if leftover is None else taken(leftover)), max(planned.sizes.values(), default=0))
    with (
        complete_directory(place, name, lambda: data_of(place.directory, name)) as partial,
        swapped() as swap,
        _pool(cluster, workers) as pool,
    ):
        apart = {id(slot) for slot in streamed}
        meter = Meter(total, progress)
        digests = Digests()
        for slot, tensor in in_memory([slot for slot in slots if id(slot) not in apart], meter, workers, digests):
            swap(slot, tensor)
        stored = planned.stored(partial)
        for slot in streamed:
            swap(slot, Absent(slot.tensor) if single else stored[id(slot.tensor)])
        message = with_room(_serialized(model), {s.key: s.tensor.nbytes for s in streamed} if single else {})
        planned = message.plan(name, streamed) if single else planned
        planned.make_room(partial)
        for write, outcome in made(planned.writes, partial, None if single else known, pool, memory=_kept_to(budget)):
            for piece, digest in zip(write.pieces, outcome.digests, strict=False):  # none of what is copied
                digests.add(piece.tensor, piece.start, piece.length, digest)
            meter.add(write.nbytes)
        message.write(partial / name)
        require_unchanged(model)  # before the files are judged: input that changed is what is wrong then
        written = verify(model, slots, partial / name, digests, pool.digests)
        if inspect is not None:
            inspect(slots, written)
        for other in others:
            shutil.copyfile(other, partial / other.name)
    return place.given / name


def _identity(
    model: ir.Model, planned: Plan, identity: Mapping[str, str] | None, *, resumed: bool
) -> Mapping[str, str] | None:
    """What the run is of; None where nobody can say."""
    if identity is None:
        if resumed:
            raise UsageError(
                "only a model that is given as a path, without a quantizer of one's own, can be told from another, so"
                " that its run can be resumed; leave out resume"
            )
        return None
    data = f"{len(planned.sizes)} data files of {nbytes(sum(planned.sizes.values()))} ({planned.digest()[:12]})"
    return {**identity, "version": code(), "model data": files(files_read(model)), "plan of the output": data}


def _data_file(name: str, data_name: str | None, index: int, count: int) -> str:
    if data_name is not None:
        return f"{data_name}_{index}" if index else data_name
    return f"{name}.data" if count == 1 else f"{name}-{index + 1:05d}-of-{count:05d}.data"


def _pool(cluster: Client | None, workers: int) -> Threads:
    if cluster is None:
        return Threads(workers)
    from rewriter.io.cluster import Cluster  # noqa: PLC0415 -- for whoever has one

    return Cluster(cluster, workers)


def _kept_to(asked: int) -> int:
    """The bytes of computed tensors that may be in flight: as many as asked for, if the machine has them."""
    left = available()
    return asked if left is None else max(1, min(asked, left // _SHARE))


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """Returns the model with every tensor in memory, computed where it was lazy; the model is unchanged.

    Raises:
        ModelError: it does not fit into a protobuf message (2 GB), or its data changed while they were read.
    """
    require_unchanged(model)
    slots = list(stored_tensors(model))
    _check_limit(total_bytes(model))
    with swapped() as swap:
        for slot, tensor in in_memory(slots, Meter(0, None), processors(), Digests()):
            swap(slot, tensor)
        proto: onnx.ModelProto = ir.to_proto(model)
    require_unchanged(model)
    _check_limit(proto.ByteSize())
    return proto


def _is_streamed(slot: Slot) -> bool:
    """True for what goes into a data file.

    A computed tensor does whatever its size: one job computes several (codes, scales), and a small one taken out of
    turn would keep its neighbours in memory.
    """
    tensor = slot.tensor
    if not isinstance(slot.owner, ir.Value) or tensor.dtype == ir.DataType.STRING or not tensor.nbytes:
        return False
    computed = isinstance(tensor, ir.LazyTensor) and not isinstance(tensor, ViewTensor)
    return computed or tensor.nbytes > INLINE_BYTES


def _serialized(model: ir.Model) -> bytes:
    try:
        proto = ir.to_proto(model)
    except ir.serde.SerdeError as error:
        raise ModelError(f"the model cannot be written: {root_cause(error)}") from error
    _check_limit(proto.ByteSize())
    return bytes(proto.SerializeToString(deterministic=True))


def _check_limit(size: int) -> None:
    if size > _PROTOBUF_LIMIT:
        raise ModelError(
            f"{size / 1e9:.1f} GB do not fit into one ONNX message, which holds 2 GB; save the model to a directory,"
            " with its constants as initializers"
        )


def _inputs(model: ir.Model) -> Iterable[Path]:
    """The files that the model was read from and is read from."""
    found = {Path(slot.tensor.path) for slot in stored_tensors(model) if isinstance(slot.tensor, ir.ExternalTensor)}
    source = source_path(model)
    return sorted(found | ({source} if source else set()))
