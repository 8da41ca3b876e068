"""A sample of what was written, read from the file and compared with what was given.

Quantized weights are dequantized and held to the error that was recorded as they were quantized; a few rows of each
copy are held to their source.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.errors import ParityError
from rewriter.graph.contents import Slot, stored_tensors
from rewriter.quantize.error import relative_rms
from rewriter.quantize.job import Parts, PartTensor, QuantizationJob
from rewriter.report import Weight
from rewriter.tensors import RowsTensor, View, ViewTensor, drop_pages

_Written = tuple[QuantizationJob, int | None, tuple[PartTensor, ...]]
"""What quantized a weight, the position of its expert in a stack, and its parts in their order."""

_SAMPLE = 16
"""Weights that are looked at: those whose names have the smallest digests, which is as good as drawn by lot."""

_LARGEST = 1 << 26
"""Elements above which a weight is not looked at: an embedding table costs as much as all the others."""

_SMALL = 1 << 22
"""Bytes up to which a copy is made once more to be compared."""

_TOLERANCE = 1e-4
"""Of an error that is computed twice, from the same codes."""


def require_sources(
    given: Sequence[Slot], written: ir.Model, recorded: Callable[[QuantizationJob], Weight | None]
) -> None:
    """Checks a sample of the written weights against their sources: the error must be the one that the report names.

    Args:
        given: the tensors of what was written, the lazy ones among them as they were.
        written: the model read back from the file.
        recorded: what the report says of a job, None where it was never computed.

    Raises:
        ParityError: a written weight is not the one that was quantized.
    """
    names = {id(slot.tensor): slot.label for slot in given}
    held = {slot.label: slot.tensor for slot in stored_tensors(written)}
    for slot in given:
        if isinstance(slot.tensor, ir.LazyTensor) and not isinstance(slot.tensor, PartTensor):
            _require_copied(slot.tensor, held[slot.label], slot.label)
    for job, position, tensors in _sample(given):
        unpack = tensors[0].parts.stored.unpack
        arrays = [_part(held[names[id(tensor)]], position) for tensor in tensors]
        record = recorded(job)
        if record is None:
            raise ParityError(f"weight '{job.context.weight}' was written and never quantized; nothing was written")
        error = relative_rms(job.weight.numpy(), unpack(arrays))
        drop_pages(job.weight)
        if not math.isclose(error, record.relative_rms, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE):
            raise ParityError(
                f"weight '{job.context.weight}' has a relative RMS error of {error:.3g} as it was written, and of"
                f" {record.relative_rms:.3g} as it was quantized; nothing was written"
            )


def _require_copied(tensor: ir.LazyTensor, written: ir.TensorProtocol, label: str) -> None:
    """Checks a few rows of a copied tensor against the original."""
    if not tensor.size or not tensor.shape.rank() or tensor.dtype.bitwidth < 8:
        return
    rows = int(tensor.shape.numpy()[0])
    lot = int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "little") % rows
    stored = View.whole(written, "")
    whole = tensor.numpy() if tensor.nbytes <= _SMALL else None
    for row in dict.fromkeys((0, lot, rows - 1)):
        if whole is not None:
            source = whole[row]
        elif isinstance(tensor, ViewTensor):
            source = tensor.view.index(0, row).numpy()
        elif isinstance(tensor, RowsTensor):
            source = tensor.rows(row, 1)[0]
        else:
            return
        if np.asarray(source).tobytes() != stored.index(0, row).numpy().tobytes():
            raise ParityError(f"row {row} of {label} is not its source's as it was written; nothing was written")


def _sample(given: Sequence[Slot]) -> list[_Written]:
    """Picks some of the written weights at random, the same ones in every run."""
    groups: dict[Parts, dict[int, PartTensor]] = {}
    for slot in given:
        if isinstance(slot.tensor, PartTensor):
            groups.setdefault(slot.tensor.parts, {})[slot.tensor.index] = slot.tensor
    found: list[_Written] = []
    for group in groups.values():
        tensors = tuple(group[index] for index in sorted(group))
        if tensors[0].stacked:
            found += [(job, position, tensors) for position, job in enumerate(tensors[0].jobs)]
        else:
            found.append((tensors[0].jobs[0], None, tensors))
    return sorted((one for one in found if one[0].weight.size <= _LARGEST), key=lambda one: _lot(one[0]))[:_SAMPLE]


def _lot(job: QuantizationJob) -> bytes:
    return hashlib.sha256(f"{job.context.weight} {job.context.node}".encode()).digest()


def _part(tensor: ir.TensorProtocol, position: int | None) -> npt.NDArray[Any]:
    if position is None:
        return tensor.numpy()
    return np.asarray(View.whole(tensor, "").index(0, position).numpy())
