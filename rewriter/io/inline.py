"""A model in one file: its message has room for each weight, which is written there and never held whole.

The message is serialized with nothing in the place of these weights; then room is made for each. The bytes are those
that serializing the whole model would give.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from rewriter.graph.contents import Slot
from rewriter.io.writes import Plan, Range, planned

_GRAPH, _INITIALIZER, _NAME, _RAW_DATA = 7, 5, 8, 9
"""Numbers of fields: the first of a model's message, the second of a graph's, the others of a tensor's."""

_NUMBER, _LENGTH, _FOUR = 0, 2, 5
"""Kinds of fields: a number of any length, as many bytes as they say, four bytes; the other kind has eight."""

Gap = tuple[str, int]
"""A weight that is not there, and its bytes."""

Piece = memoryview | bytes | Gap


def inlined(model: ir.Model, slots: Sequence[Slot]) -> list[Slot]:
    """Returns the initializers of the main graph that are computed or read from a file, and lie in no other place."""
    places = Counter(id(slot.tensor) for slot in slots)
    return [
        slot
        for slot in slots
        if isinstance(slot.tensor, ir.LazyTensor | ir.ExternalTensor)
        and isinstance(slot.owner, ir.Value)
        and slot.owner.graph is model.graph
        and places[id(slot.tensor)] == 1
    ]


class Absent(ir.LazyTensor):
    """Stands for a tensor whose bytes are written into the message later."""

    def __init__(self, tensor: ir.TensorProtocol) -> None:
        shape = ir.Shape(tensor.shape.numpy())
        super().__init__(lambda: tensor, dtype=tensor.dtype, shape=shape, name=tensor.name)

    def tobytes(self) -> bytes:
        """Returns nothing."""
        return b""


@dataclass
class Message:
    """A serialized model with room for weights.

    Attributes:
        size: bytes of all.
        parts: offset and bytes of what lies around the weights.
        offsets: name of each weight -> where it will lie.
    """

    size: int = 0
    parts: list[tuple[int, memoryview | bytes]] = field(default_factory=list)
    offsets: dict[str, int] = field(default_factory=dict)

    def plan(self, file: str, slots: Sequence[Slot]) -> Plan:
        """Returns how the tensors of slots are written into a file of that name."""
        placed = [(s.tensor, Range(file, self.offsets[s.key], s.tensor.nbytes)) for s in slots]
        return planned({file: self.size}, placed)

    def write(self, file: Path) -> None:
        """Writes all but the weights, which are in the file already."""
        file.touch()
        with file.open("r+b") as stream:
            for offset, part in self.parts:
                stream.seek(offset)
                stream.write(part)


def with_room(message: bytes, lengths: Mapping[str, int]) -> Message:
    """Makes room in a serialized model for the bytes of initializers that have none.

    Args:
        message: of the model.
        lengths: name of each initializer -> its bytes.
    """

    def tensor(content: memoryview) -> list[Piece] | None:
        name = next((bytes(content[at:stop]).decode() for n, _, at, stop in _fields(content) if n == _NAME), "")
        return list(_replaced(content, _RAW_DATA, lambda _: [(name, lengths[name])])) if name in lengths else None

    def graph(content: memoryview) -> list[Piece]:
        return list(_replaced(content, _INITIALIZER, tensor))

    found = Message()
    for piece in _replaced(memoryview(message), _GRAPH, graph) if lengths else [message]:
        if isinstance(piece, tuple):
            found.offsets[piece[0]] = found.size
        else:
            found.parts.append((found.size, piece))
        found.size += _length(piece)
    return found


def _replaced(message: memoryview, number: int, content: Callable[[memoryview], list[Piece] | None]) -> Iterator[Piece]:
    """Yields a message in pieces, the contents of some fields of one number replaced."""
    done = 0
    for own, begin, start, stop in _fields(message):
        pieces = content(message[start:stop]) if own == number else None
        if pieces is not None:
            yield message[done:begin]
            yield _varint(number << 3 | _LENGTH) + _varint(sum(map(_length, pieces)))
            yield from pieces
            done = stop
    yield message[done:]


def _length(piece: Piece) -> int:
    return piece[1] if isinstance(piece, tuple) else len(piece)


def _fields(message: memoryview) -> Iterator[tuple[int, int, int, int]]:
    """Yields the number of each field, where it begins, and where its content begins and ends."""
    begin = 0
    while begin < len(message):
        key, start = _read_varint(message, begin)
        kind, stop = key & 7, start + 8
        if kind == _LENGTH:
            length, start = _read_varint(message, start)
            stop = start + length
        elif kind == _NUMBER:
            _, stop = _read_varint(message, start)
        elif kind == _FOUR:
            stop = start + 4
        yield key >> 3, begin, start, stop
        begin = stop


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*found, number))


def _read_varint(message: memoryview, at: int) -> tuple[int, int]:
    """Returns a number and where it ends."""
    number = shift = 0
    while True:
        byte = message[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7
