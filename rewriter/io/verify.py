"""What was written is what was computed: each tensor of a file is looked up by its name and held to its digest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import onnx_ir as ir

from rewriter.errors import ParityError
from rewriter.graph.contents import Slot, all_nodes, stored_tensors
from rewriter.io.writes import Piece


class Digests:
    """The digests of computed tensors: by their jobs, or taken as they were written; some in several pieces."""

    def __init__(self) -> None:
        self._pieces: dict[int, dict[int, tuple[int, int, bytes]]] = {}

    def add(self, tensor: ir.TensorProtocol, start: int, length: int, digest: bytes) -> None:
        """Takes the digest of so many bytes of a tensor; those of one that is written twice are the same."""
        self._pieces.setdefault(id(tensor), {})[start] = start, length, digest

    def of(self, tensor: ir.TensorProtocol) -> list[tuple[int, int, bytes]]:
        """Returns start, bytes and digest of pieces that are all of a tensor; of one that was not computed, none."""
        found = self._pieces.get(id(tensor))
        if found is None:
            return []
        if sum(length for _, length, _ in found.values()) != tensor.nbytes:
            raise AssertionError(f"not all of {tensor.name} was written")
        return list(found.values())


def verify(
    model: ir.Model,
    given: Sequence[Slot],
    file: Path,
    streamed: Digests,
    read: Callable[[Sequence[Piece]], Iterable[bytes]],
) -> ir.Model:
    """Reads a written model back; returns it.

    Its nodes must be those of the model, and read the same names; each tensor's bytes must have the digest that the
    job which quantized it computed, or that was taken while they were written, now or by a run that was killed, or that
    its source has now.

    Args:
        model: what was written.
        given: its tensors, before any was computed or written.
        file: the written ``.onnx`` file.
        streamed: digests of what was computed.
        read: returns the digests of what is stored, in the order of the pieces.

    Raises:
        ParityError: the file holds something else.
    """
    written: ir.Model = ir.load(file)
    _require_same_graph(model, written, file)
    held = list(stored_tensors(written))
    labels = [slot.label for slot in given]
    if labels != [slot.label for slot in held]:
        raise _fault(file, "the tensors have other names")
    pieces: list[tuple[str, Piece, bytes | Piece]] = []
    for slot, actual in zip(given, (slot.tensor for slot in held), strict=True):
        expected = slot.tensor
        if expected.dtype == ir.DataType.STRING:
            continue
        if _form(expected) != _form(actual):
            raise _fault(file, f"{slot.label} does not hold what was computed for it")
        computed = streamed.of(expected)
        pieces += [(slot.label, Piece(actual, start, length), digest) for start, length, digest in computed]
        if not computed:
            pieces.append((slot.label, Piece(actual, 0, actual.nbytes), Piece(expected, 0, expected.nbytes)))
    sources = [right for *_, right in pieces if isinstance(right, Piece)]
    found = list(read([*(piece for _, piece, _ in pieces), *sources]))
    of_sources = iter(found[len(pieces) :])
    for (label, _, right), digest in zip(pieces, found, strict=False):
        if digest != (next(of_sources) if isinstance(right, Piece) else right):
            raise _fault(file, f"{label} does not hold what was computed for it")
    return written


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
