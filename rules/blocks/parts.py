"""Parts: a run of positions of one index, or one; of sizes too.

Facts stated: ``Located`` (of whatever content the input has), ``Integers``, ``Pieces``.
Source: Slice, Split and SplitToSequence, as every exporter cuts gate and up, slots and columns apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx_ir as ir

from rewriter.facts import Facts, Recogniser
from rewriter.rules.blocks.axes import Located, Pieces, put, total
from rewriter.rules.blocks.guards import integer_attribute
from rewriter.rules.blocks.movement import Movement, cut_at
from rewriter.rules.blocks.sizes import Integers, static
from rewriter.tensors import View


class Slice(Movement):
    """A run of positions of an index."""

    def sizes(self, facts: Facts, sizes: Integers, node: ir.Node) -> Integers | None:
        bounds = [static(facts, node, i, name) for i, name in ((1, "starts"), (2, "ends"))]
        steps = static(facts, node, 4, "", [1])
        if bounds[0] is None or bounds[1] is None or steps is None or sizes.scalar:
            return None
        return Integers(sizes.sizes[slice(bounds[0][0], bounds[1][0], steps[0])])

    def move(self, facts: Facts, data: Located, node: ir.Node) -> Located | None:
        starts, ends = static(facts, node, 1, "starts"), static(facts, node, 2, "ends")
        if starts is None or ends is None:
            return None
        at = static(facts, node, 3, "axes", range(len(starts)))
        steps = static(facts, node, 4, "", [1] * len(starts))
        if at is None or steps is None:
            return None
        for axis, start, end, step in zip(at, starts, ends, steps, strict=True):
            extent = total(data.axes[axis]).constant
            if extent is None or step < 1:
                return None
            run = range(*slice(start, end, step).indices(extent))
            cut = cut_at(data, axis % data.rank, run.start, len(run), step)
            if cut is None:
                return None
            data = cut
        return data


class Split(Movement):
    """Equal parts, or constant lengths, of one dimension."""

    def sizes(self, facts: Facts, sizes: Integers, node: ir.Node) -> Mapping[ir.Value, Integers] | None:
        lengths = _lengths(facts, node, len(sizes.sizes))
        if lengths is None or sizes.scalar:
            return None
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        runs = zip(node.outputs, starts, lengths, strict=True)
        return {out: Integers(sizes.sizes[start : start + length]) for out, start, length in runs}

    def move(self, facts: Facts, data: Located, node: ir.Node) -> Mapping[ir.Value, Located] | None:
        axis = integer_attribute(node, "axis", 0) % data.rank
        extent = total(data.axes[axis]).constant
        lengths = None if extent is None else _lengths(facts, node, extent)
        if lengths is None:
            return None
        parts = {}
        start = 0
        for out, length in zip(node.outputs, lengths, strict=True):
            part = cut_at(data, axis, start, length)
            if part is not None:
                parts[out] = part
            start += length
        return parts


def _lengths(facts: Facts, node: ir.Node, extent: int) -> list[int] | None:
    count = len(node.outputs)
    chunk = -(-extent // count)
    even = [max(0, min(chunk, extent - i * chunk)) for i in range(count)]
    lengths = static(facts, node, 1, "split", even)
    return lengths if lengths is not None and sum(lengths) == extent and len(lengths) == count else None


class SplitToSequence(Movement):
    """Equal parts of one dimension, as a sequence."""

    def move(self, facts: Facts, data: Located, node: ir.Node) -> Pieces | None:
        axis = integer_attribute(node, "axis", 0) % data.rank
        extent = total(data.axes[axis]).constant
        chunk = static(facts, node, 1, "", [1])
        given = len(node.inputs) > 1 and node.inputs[1] is not None
        if extent is None or chunk is None or len(chunk) != 1 or extent % chunk[0]:
            return None
        parts = [cut_at(data, axis, start, chunk[0]) for start in range(0, extent, chunk[0])]
        if None in parts:
            return None
        items = tuple(part for part in parts if part is not None)
        if not given and not integer_attribute(node, "keepdims", 1):
            items = tuple(replace(part, axes=put(part.axes, axis)) for part in items)
        return Pieces(items)


class SequenceAt(Movement):
    """One part of a sequence."""

    def recognise(self, facts: Facts, *, data: ir.Value | None, out: ir.Value) -> Located | None:
        node = out.producer()
        pieces = None if data is None else facts.get(data, Pieces)
        position = None if node is None else static(facts, node, 1)
        if pieces is None or position is None or not -len(pieces.items) <= position[0] < len(pieces.items):
            return None
        return pieces.items[position[0]]


def gathered(data: Located, index: View, axis: int) -> Located | None:
    """Returns constant positions along one dimension, as Gather takes them."""
    extent = total(data.axes[axis]).constant
    if extent is None or index.rank > 1 or not index.size:
        return None
    where = [int(i) + (extent if i < 0 else 0) for i in index.numpy().reshape(-1).tolist()]
    step = where[1] - where[0] if len(where) > 1 else 1
    if step < 1 or not 0 <= where[0] <= where[-1] < extent or list(range(where[0], where[-1] + 1, step)) != where:
        return None
    cut = cut_at(data, axis, where[0], len(where), step)
    if cut is None or index.rank:
        return cut
    return replace(cut, axes=put(cut.axes, axis)) if not cut.axes[axis] else None


def picked_sizes(sizes: Integers, index: View) -> Integers | None:
    """Returns constant positions of a vector of sizes."""
    count = len(sizes.sizes)
    where = [int(i) for i in index.numpy().reshape(-1).tolist()]
    if sizes.scalar or index.rank > 1 or not all(-count <= i < count for i in where):
        return None
    return Integers(tuple(sizes.sizes[i] for i in where), index.rank == 0)


RECOGNISERS: tuple[Recogniser, ...] = (Slice(), Split(), SplitToSequence(), SequenceAt())
