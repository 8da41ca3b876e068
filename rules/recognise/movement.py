"""Movement operators: the same content on other axes, or a part of it; and the same for vectors of sizes.

Facts stated: ``Located`` (of whatever content the input has), ``Integers``.
Source: every exporter; see FORMS of the tests' models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import onnx_ir as ir

from rewriter.facts import Facts, Recogniser
from rewriter.tensors import View
from rules._guards import integer_attribute, integers_attribute
from rules.recognise.axes import (
    ONE,
    Atom,
    Axes,
    Dim,
    Located,
    Pieces,
    Size,
    feature,
    put,
    reshape,
    tokens,
    total,
)
from rules.recognise.contents import Tokens
from rules.recognise.sizes import Integers, integers_of, reshaped, shape_of, static

Moved = object | Mapping[ir.Value, object] | None


def token_rows(facts: Facts, value: ir.Value, features: int | None = None) -> Located | None:
    """Returns ``value`` as the tokens that it is where it is nothing else: [.., H] with H features.

    Args:
        facts: what is known.
        value: a float value of rank 2 or more.
        features: H, where the model does not say.
    """
    if value.dtype is not None and not value.dtype.is_floating_point():
        return None
    dims = shape_of(facts, value)
    if dims is None or len(dims) < 2:
        return None
    last = dims[-1].constant if dims[-1].constant is not None else features
    if last is None or features not in (None, last):
        return None
    return Located(Tokens(value), (*(tokens(size) for size in dims[:-1]), feature(last)))


class _Move(Recogniser):
    """``Op(data, operands...)``; a value that has no content yet may be tokens where ``roots`` says so."""

    roots = False

    def pattern(self, op: Any, data: Any) -> Any:
        return getattr(op, type(self).__name__)(data, _allow_other_inputs=True, _outputs=["out"])

    def recognise(self, facts: Facts, *, data: ir.Value | None, out: ir.Value) -> Moved:
        node = out.producer()
        if data is None or node is None or facts.get(data, View) is not None:
            return None
        sizes = facts.get(data, Integers)
        if sizes is not None:
            return self.sizes(facts, sizes, node)
        located = facts.get(data, Located)
        if located is None and self.roots:
            located = token_rows(facts, data)
        return None if located is None else self.move(facts, located, node)

    def sizes(self, facts: Facts, sizes: Integers, node: ir.Node) -> Moved:
        return None

    def move(self, facts: Facts, data: Located, node: ir.Node) -> Moved:
        raise NotImplementedError


class Identity(_Move):
    """The same."""

    def sizes(self, facts: Facts, sizes: Integers, node: ir.Node) -> Integers:
        return sizes

    def move(self, facts: Facts, data: Located, node: ir.Node) -> Located:
        return data


class Transpose(_Move):
    """Any permutation; without ``perm`` the dimensions are reversed."""

    def move(self, facts: Facts, data: Located, node: ir.Node) -> Located:
        perm = integers_attribute(node, "perm", range(data.rank)[::-1])
        return replace(data, axes=tuple(data.axes[p] for p in perm))


class Unsqueeze(_Move):
    """New dimensions of extent 1."""

    roots = True

    def sizes(self, facts: Facts, sizes: Integers, node: ir.Node) -> Integers | None:
        return replace(sizes, scalar=False) if sizes.scalar else None

    def move(self, facts: Facts, data: Located, node: ir.Node) -> Located | None:
        new = static(facts, node, 1, "axes")
        if new is None:
            return None
        rank = data.rank + len(new)
        at = {a % rank for a in new}
        kept = iter(data.axes)
        return replace(data, axes=tuple(() if i in at else next(kept) for i in range(rank)))


class Squeeze(_Move):
    """Dimensions of extent 1, gone; an index that had one position only is fixed there."""

    def sizes(self, facts: Facts, sizes: Integers, node: ir.Node) -> Integers | None:
        return replace(sizes, scalar=True) if len(sizes.sizes) == 1 else None

    def move(self, facts: Facts, data: Located, node: ir.Node) -> Located | None:
        sizes = [total(dim).constant for dim in data.axes]
        ones = None if None in sizes else [i for i, size in enumerate(sizes) if size == 1]
        gone = static(facts, node, 1, "axes", ones)
        if gone is None:
            return None
        at = sorted({a % data.rank for a in gone}, reverse=True)
        for position in at:
            if any(atom.size != ONE for atom in data.axes[position]):
                return None
            moved = _pick(data, position, 0)
            if moved is None:
                return None
            data = replace(moved, axes=put(moved.axes, position))
        return data


class Reshape(_Move):
    """Another shape, constant or computed from shapes, that cuts no index."""

    roots = True

    def sizes(self, facts: Facts, sizes: Integers, node: ir.Node) -> Integers | None:
        target = static(facts, node, 1)
        return replace(sizes, scalar=False) if target in ([-1], [1]) and len(sizes.sizes) == 1 else None

    def move(self, facts: Facts, data: Located, node: ir.Node) -> Located | None:
        target = integers_of(facts, node.inputs[1])
        if target is None:
            return None
        sizes = tuple(total(dim) for dim in data.axes)
        keep = not integer_attribute(node, "allowzero", 0)
        dims = reshaped(sizes, target.sizes, keep_zeros=keep)
        if dims is None:
            return None
        fresh = facts.get(node.inputs[0], Located) is None if node.inputs[0] is not None else True
        if fresh:
            return data if dims == sizes else None
        axes = reshape(data.axes, dims)
        return None if axes is None else replace(data, axes=axes)


class Flatten(_Move):
    """Two dimensions, cut at an axis."""

    def move(self, facts: Facts, data: Located, node: ir.Node) -> Located:
        axis = integer_attribute(node, "axis", 1)
        axis = axis + data.rank if axis < 0 else axis
        return replace(data, axes=(_joined(data.axes[:axis]), _joined(data.axes[axis:])))


def _joined(axes: Axes) -> Dim:
    return tuple(atom for dim in axes for atom in dim)


class Expand(_Move):
    """Dimensions of extent 1 repeated; nothing depends on which repetition it is."""

    roots = True

    def move(self, facts: Facts, data: Located, node: ir.Node) -> Located | None:
        target = integers_of(facts, node.inputs[1])
        if target is None:
            return None
        lacking = len(target.sizes) - data.rank
        axes: list[Dim] = [()] * lacking + list(data.axes)
        wanted = (ONE,) * -lacking + target.sizes
        for position, size in enumerate(wanted):
            if size in (ONE, total(axes[position])):
                continue
            if axes[position]:
                return None
            axes[position] = (Atom("repeat", size),)
        return replace(data, axes=tuple(axes))


class Tile(_Move):
    """Repetitions in front of what they repeat."""

    roots = True

    def move(self, facts: Facts, data: Located, node: ir.Node) -> Located | None:
        counts = static(facts, node, 1)
        if counts is None or len(counts) != data.rank:
            return None
        pairs = zip(counts, data.axes, strict=True)
        return replace(
            data, axes=tuple((Atom("repeat", Size(n)), *dim) if n != 1 else dim for n, dim in pairs)
        )


class Slice(_Move):
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


def cut_at(data: Located, axis: int, start: int, count: int, step: int = 1) -> Located | None:
    """Returns evenly stepping positions along one dimension, which stays; one position fixes its index."""
    dim = data.axes[axis]
    if (start, count, step) == (0, total(dim).constant, 1):
        return data
    if count == 1:
        return _pick(data, axis, start)
    if len(dim) != 1:
        return None
    part = data.content.part(dim[0], start, count, step)
    if part is None:
        return None
    return Located(part, put(data.axes, axis, (replace(dim[0], size=Size(count)),)))


def _pick(data: Located, axis: int, position: int) -> Located | None:
    """Returns one position along a dimension, which stays with extent 1."""
    dim = data.axes[axis]
    if not dim:
        return data
    fixed = data.content.fix(dim[0], position) if len(dim) == 1 else None
    return None if fixed is None else Located(fixed, put(data.axes, axis, ()))


class Split(_Move):
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


class SplitToSequence(_Move):
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


class SequenceAt(_Move):
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


RECOGNISERS: tuple[Recogniser, ...] = (
    Identity(),
    Transpose(),
    Unsqueeze(),
    Squeeze(),
    Reshape(),
    Flatten(),
    Expand(),
    Tile(),
    Slice(),
    Split(),
    SplitToSequence(),
    SequenceAt(),
)
