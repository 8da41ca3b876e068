"""What was written is what was computed: each tensor of a file is looked up by its name and held to its digest."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnx_ir as ir

from rewriter.errors import ParityError
from rewriter.graph.contents import Slot, all_nodes, stored_tensors
from rewriter.tensors import drop_pages
from rewriter.tensors.digest import digest_of, digest_of_range


class Digests:
    """The digests of computed tensors: by their jobs, or taken as they were written; some in several pieces."""

    def __init__(self) -> None:
        self._pieces: dict[int, dict[int, tuple[int, int, bytes]]] = {}

    def add(self, tensor: ir.TensorProtocol, start: int, length: int, digest: bytes) -> None:
        """Takes the digest of so many bytes of a tensor; those of one that is written twice are the same."""
        self._pieces.setdefault(id(tensor), {})[start] = start, length, digest

    def of(self, tensor: ir.TensorProtocol) -> list[tuple[int, int, bytes]]:
        """Returns start, bytes and digest of pieces that are all of a tensor; of a stored one, read now."""
        found = self._pieces.get(id(tensor))
        if found is None:
            digest = digest_stored(tensor, 0, tensor.nbytes)
            drop_pages(tensor)
            return [(0, tensor.nbytes, digest)]
        if sum(length for _, length, _ in found.values()) != tensor.nbytes:
            raise AssertionError(f"not all of {tensor.name} was written")
        return list(found.values())


def verify(model: ir.Model, given: Sequence[Slot], file: Path, streamed: Digests, workers: int) -> ir.Model:
    """Reads a written model back; returns it.

    Its nodes must be those of the model, and read the same names; each tensor's bytes must have the digest that the
    job which quantized it computed, or that was taken while they were written, now or by a run that was killed, or that
    its source has now.

    Args:
        model: what was written.
        given: its tensors, before any was computed or written.
        file: the written ``.onnx`` file.
        streamed: digests of what was computed.
        workers: threads.

    Raises:
        ParityError: the file holds something else.
    """
    written: ir.Model = ir.load(file)
    _require_same_graph(model, written, file)
    held = list(stored_tensors(written))
    labels = [slot.label for slot in given]
    if labels != [slot.label for slot in held]:
        raise _fault(file, "the tensors have other names")

    def check(pair: tuple[Slot, Slot]) -> str:
        expected, actual = pair
        same_form = _form(expected.tensor) == _form(actual.tensor)
        if not same_form:
            return expected.label
        pieces = streamed.of(expected.tensor)
        right = all(digest_stored(actual.tensor, start, length) == digest for start, length, digest in pieces)
        return "" if right else expected.label

    pairs = [pair for pair in zip(given, held, strict=True) if pair[0].tensor.dtype != ir.DataType.STRING]
    with ThreadPoolExecutor(max_workers=workers) as pool:
        for wrong in pool.map(check, pairs):
            if wrong:
                raise _fault(file, f"{wrong} does not hold what was computed for it")
    return written


def digest_stored(tensor: ir.TensorProtocol, start: int, length: int) -> bytes:
    """Returns the digest of a part of a tensor in a file or in memory."""
    if isinstance(tensor, ir.ExternalTensor):
        return digest_of_range(Path(tensor.path), (tensor.offset or 0) + start, length)
    return digest_of(tensor.tobytes()[start : start + length])


def _form(tensor: ir.TensorProtocol) -> tuple[object, ...]:
    return tensor.dtype, tuple(tensor.shape.numpy())


def _require_same_graph(model: ir.Model, written: ir.Model, file: Path) -> None:
    for what in ("inputs", "outputs"):
        if [v.name for v in getattr(model.graph, what)] != [v.name for v in getattr(written.graph, what)]:
            raise _fault(file, f"its {what} have other names")
    for node, other in zip(all_nodes(model), all_nodes(written), strict=True):
        if _reads(node) != _reads(other):
            raise _fault(file, f"node '{node.name}' reads or computes other values")


def _reads(node: ir.Node) -> tuple[object, ...]:
    inputs = [value.name if value is not None else None for value in node.inputs]
    return node.domain, node.op_type, [name or None for name in inputs], [value.name for value in node.outputs]


def _fault(file: Path, what: str) -> ParityError:
    return ParityError(f"'{file.name}' does not hold what was computed: {what}; nothing was written, try once more")
