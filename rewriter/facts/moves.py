"""What a movement operator does to its first input, read once: a few primitive moves for each of its outputs.

Whoever knows something of a value says what the primitives make of that: constants, shapes, contents, roles, readers.
No other place reads the operands of these operators.
Source: the operators' specification; operands are inputs, or attributes in older opsets.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import onnx_ir as ir

from rewriter.facts.facts import Facts
from rewriter.facts.integers import integers_of, static
from rewriter.facts.size import ONE, Dims, Size, reshaped, total_of
from rewriter.graph.attributes import integer_attribute, integers_attribute
from rewriter.graph.declines import CONSTANT, Declined
from rewriter.tensors import View

T = TypeVar("T")

_FAR = (2**31 - 1, 2**63 - 1)
_PARTS = 1 << 16  # more parts of a sequence than any model has experts; an extent that is not known counts as far more


@dataclass(frozen=True)
class Permute:
    """The dimensions in another order."""

    order: tuple[int, ...]


@dataclass(frozen=True)
class Cut:
    """``count`` positions along an axis from ``start``, ``step`` apart; the axis stays."""

    axis: int
    start: int
    count: int
    step: int = 1


@dataclass(frozen=True)
class Select:
    """Positions along an axis that do not step evenly; the axis stays."""

    axis: int
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Take:
    """One position along an axis, which is removed."""

    axis: int
    position: int


@dataclass(frozen=True)
class Insert:
    """New dimensions of extent 1, at these places of the result, in ascending order."""

    axes: tuple[int, ...]


@dataclass(frozen=True)
class Drop:
    """Dimensions of extent 1 are removed; given in ascending order."""

    axes: tuple[int, ...]


@dataclass(frozen=True)
class Regroup:
    """The same elements in another shape, with no 0 and -1 left in it."""

    sizes: Dims


@dataclass(frozen=True)
class Repeat:
    """Broadcast with a shape, or (``tiled``) repeated so many times along each dimension."""

    sizes: Dims
    tiled: bool = False


Move = Permute | Cut | Select | Take | Insert | Drop | Regroup | Repeat
Moves = tuple[Move, ...]


@dataclass(frozen=True)
class Parts:
    """The moves that make each piece of a sequence."""

    items: tuple[Moves, ...]


def read(facts: Facts, node: ir.Node, dims: Sequence[Size]) -> Mapping[ir.Value, Moves | Parts]:
    """Returns the moves that make each output from a first input of these extents; empty for other operators.

    Raises:
        Declined: an operand depends on an input, or does not fit.
        IndexError, ValueError, ZeroDivisionError: an operand does not fit.
    """
    reader = _READERS.get(node.op_type)
    if reader is None or node.domain:
        return {}
    found = reader(facts, node, tuple(dims))
    return {node.outputs[0]: found} if isinstance(found, tuple) else found


def moved(dims: Dims, moves: Moves) -> Dims:
    """Returns the extents of what the moves make of a value of extents ``dims``."""
    for move in moves:
        match move:
            case Permute(order):
                dims = tuple(dims[p] for p in order)
            case Cut(axis, _, count, _):
                dims = (*dims[:axis], Size.of(count), *dims[axis + 1 :])
            case Select(axis, positions):
                dims = (*dims[:axis], Size.of(len(positions)), *dims[axis + 1 :])
            case Take(axis, _):
                dims = (*dims[:axis], *dims[axis + 1 :])
            case Insert(axes):
                dims = inserted(dims, axes, ONE)
            case Drop(axes):
                dims = tuple(size for i, size in enumerate(dims) if i not in axes)
            case Regroup(sizes):
                dims = sizes
            case Repeat(counts, tiled=True):
                dims = tuple(size * count for size, count in zip(dims, counts, strict=True))
            case Repeat(sizes):
                rank = max(len(dims), len(sizes))
                pairs = zip(*(((ONE,) * (rank - len(some)) + some) for some in (dims, sizes)), strict=True)
                dims = tuple(size if wanted == ONE else wanted for size, wanted in pairs)
    return dims


def inserted(items: Sequence[T], axes: Sequence[int], new: T) -> tuple[T, ...]:
    """Returns ``items``, one for each dimension, with ``new`` for each that ``Insert(axes)`` adds."""
    kept = iter(items)
    return tuple(new if i in axes else next(kept) for i in range(len(items) + len(axes)))


def slice_bounds(facts: Facts, node: ir.Node) -> list[tuple[int, tuple[int, int, int] | None]]:
    """Returns each axis that a Slice cuts with its start, end and step as given; None where these depend on an input.

    Raises:
        Declined: it depends on an input which axes are cut.
    """
    starts, ends = static(facts, node, 1, "starts"), static(facts, node, 2, "ends")
    axes = static(facts, node, 3, "axes", None if starts is None else range(len(starts)))
    steps = static(facts, node, 4, "", None if axes is None else [1] * len(axes))
    if axes is None or steps is None:
        moving = "bounds" if starts is None or ends is None else "axes or steps"
        raise Declined(f"the {moving} depend on an input", node, remedy=CONSTANT)
    if starts is None or ends is None:
        return [(axis, None) for axis in axes]
    return list(zip(axes, zip(starts, ends, steps, strict=True), strict=True))


def _identity(facts: Facts, node: ir.Node, dims: Dims) -> Moves:
    return ()


def _transpose(facts: Facts, node: ir.Node, dims: Dims) -> Moves:
    order = tuple(integers_attribute(node, "perm", range(len(dims))[::-1]))
    if sorted(order) != list(range(len(dims))):
        raise ValueError(f"{order} orders no {len(dims)} dimensions")
    return (Permute(order),)


def _gather(facts: Facts, node: ir.Node, dims: Dims) -> Moves:
    axis = integer_attribute(node, "axis", 0) % len(dims)
    indices = facts.get(node.inputs[1], View)
    if indices is None:
        raise Declined("the index depends on an input", node, remedy=CONSTANT)
    if indices.rank > 1:
        raise Declined(f"the indices have rank {indices.rank}; a view takes one index or a run of them", node)
    extent = _known(dims[axis], node)
    where = [i + (extent if i < 0 else 0) for i in indices.integers]
    if not all(0 <= i < extent for i in where):
        raise Declined(f"index {where} is outside axis {axis} of extent {extent}", node)
    if indices.rank == 0:
        return (Take(axis, where[0]),)
    step = where[1] - where[0] if len(where) > 1 else 1
    if not where or any(b - a != step for a, b in itertools.pairwise(where)):
        return (Select(axis, tuple(where)),)
    return (Cut(axis, where[0], len(where), step),)


def _gather_nd(facts: Facts, node: ir.Node, dims: Dims) -> Moves:
    indices = facts.get(node.inputs[1], View)
    if indices is None:
        raise Declined("the index depends on an input", node, remedy=CONSTANT)
    depth = indices.shape[-1] if indices.rank else 0
    if integer_attribute(node, "batch_dims", 0) or indices.size != depth or not 0 < depth <= len(dims):
        raise Declined("a view takes one index tuple", node)
    moves: list[Move] = []
    for position, size in zip(indices.integers, dims, strict=False):
        extent = _known(size, node)
        if not -extent <= position < extent:
            raise Declined(f"index {position} is outside an axis of extent {extent}", node)
        moves.append(Take(0, position % extent))
    return (*moves, Insert(tuple(range(indices.rank - 1))))


def _slice(facts: Facts, node: ir.Node, dims: Dims) -> Moves:
    moves = []
    for axis, bounds in slice_bounds(facts, node):
        if bounds is None:
            if _whole(facts, node, dims):
                return ()
            raise Declined("the bounds depend on an input", node, remedy=CONSTANT)
        if bounds[2] < 0 and bounds[1] in _FAR:
            raise Declined("it runs backwards to INT_MAX, which runtimes read in different ways", node)
        run = positions(*bounds, _known(dims[axis], node))
        moves.append(Cut(axis % len(dims), run.start, len(run), run.step))
    return tuple(moves)


def _whole(facts: Facts, node: ir.Node, dims: Dims) -> bool:
    """Whether a Slice takes all of the leading dimensions: from 0 to extents that are its input's own."""
    ends = integers_of(facts, node.inputs[2]) if len(node.inputs) > 2 else None
    axes = static(facts, node, 3, "axes", range(len(dims))) if ends is not None else None
    plain = set(static(facts, node, 1) or [1]) == {0} and set(static(facts, node, 4, "", [1]) or [0]) == {1}
    if ends is None or axes is None or not plain or len(axes) < len(ends.sizes):
        return False
    return all(dims[axis] == end for axis, end in zip(axes, ends.sizes, strict=False))


def positions(start: int, end: int, step: int, extent: int) -> range:
    """Returns the positions that Slice takes: as in Python, but a start before the first backwards is the first."""
    low, high = (0, extent) if step > 0 else (-1, extent - 1)
    start, end = (bound + extent if bound < 0 else bound for bound in (start, end))
    return range(min(max(start, 0), high), min(max(end, low), high), step)


def _split(facts: Facts, node: ir.Node, dims: Dims) -> Mapping[ir.Value, Moves]:
    axis = integer_attribute(node, "axis", 0) % len(dims)
    extent, count = _known(dims[axis], node), len(node.outputs)
    chunk = -(-extent // count)
    even = [max(0, min(chunk, extent - i * chunk)) for i in range(count)]
    lengths = static(facts, node, 1, "split", even)
    if lengths is None:
        raise Declined("the lengths depend on an input", node, remedy=CONSTANT)
    if sum(lengths) != extent or len(lengths) != count or min(lengths) < 0:
        raise Declined(f"lengths {lengths} do not make up extent {extent}", node)
    return dict(zip(node.outputs, _cuts(axis, lengths), strict=True))


def _cuts(axis: int, lengths: Sequence[int]) -> list[Moves]:
    starts = itertools.accumulate(lengths[:-1], initial=0)
    return [(Cut(axis, start, length),) for start, length in zip(starts, lengths, strict=True)]


def _split_to_sequence(facts: Facts, node: ir.Node, dims: Dims) -> Mapping[ir.Value, Parts]:
    axis = integer_attribute(node, "axis", 0) % len(dims)
    extent = _known(dims[axis], node)
    given = node.inputs[1] if len(node.inputs) > 1 else None
    held = integers_of(facts, given)
    lengths = static(facts, node, 1, "", [1])
    if lengths is None:
        raise Declined("the lengths depend on an input", node, remedy=CONSTANT)
    if held is None or held.scalar:
        (chunk,) = lengths
        starts = range(0, extent, chunk)
        if extent > chunk * _PARTS:
            raise Declined(f"more than {_PARTS:,} parts of a sequence are not followed", node)
        if given is None and not integer_attribute(node, "keepdims", 1):
            return {node.outputs[0]: Parts(tuple((Take(axis, i),) for i in starts))}
        lengths = [min(chunk, extent - start) for start in starts]
    if sum(lengths) != extent or min(lengths, default=0) < 0:
        raise Declined(f"lengths {lengths} do not make up extent {extent}", node)
    return {node.outputs[0]: Parts(tuple(_cuts(axis, lengths)))}


def _squeeze(facts: Facts, node: ir.Node, dims: Dims) -> Moves:
    known = all(size.constant is not None for size in dims)
    axes = static(facts, node, 1, "axes", [i for i, size in enumerate(dims) if size == ONE] if known else None)
    if axes is None:
        raise Declined("the axes depend on an input", node, remedy=CONSTANT)
    if any(dims[axis] != ONE for axis in axes):
        raise Declined(f"an axis of {axes} is not of extent 1", node)
    return (Drop(tuple(sorted({axis % len(dims) for axis in axes}))),)


def _unsqueeze(facts: Facts, node: ir.Node, dims: Dims) -> Moves:
    axes = static(facts, node, 1, "axes")
    if axes is None:
        raise Declined("the axes depend on an input", node, remedy=CONSTANT)
    new = tuple(sorted({axis % (len(dims) + len(axes)) for axis in axes}))
    if len(new) != len(axes):
        raise Declined(f"axes {axes} name one twice", node)
    return (Insert(new),)


def _reshape(facts: Facts, node: ir.Node, dims: Dims) -> Moves:
    target = integers_of(facts, node.inputs[1]) if len(node.inputs) > 1 else None
    wanted = static(facts, node, 1, "shape")
    if target is None and wanted is None:
        raise Declined("the shape depends on an input", node, remedy=CONSTANT)
    keep = not integer_attribute(node, "allowzero", 0)
    extents = [size.constant for size in dims]
    if wanted is not None and None not in extents:
        known = [extent for extent in extents if extent is not None]
        return (Regroup(tuple(map(Size, _resolved(wanted, known, node, keep_zeros=keep)))),)
    sizes = target.sizes if target is not None else tuple(map(Size, wanted or ()))
    found = reshaped(dims, sizes, keep_zeros=keep)
    if found is None:
        raise Declined("the shape depends on an input", node, remedy=CONSTANT)
    return (Regroup(found),)


def _resolved(target: Sequence[int], extents: Sequence[int], node: ir.Node, *, keep_zeros: bool) -> list[int]:
    size = math.prod(extents)
    shape = [extents[i] if d == 0 and keep_zeros else d for i, d in enumerate(target)]
    known = math.prod(d for d in shape if d != -1)
    if -1 in shape and not known:
        raise Declined(f"-1 has no one value in shape {shape}", node)
    shape = [size // known if d == -1 else d for d in shape]
    if math.prod(shape) != size:
        raise Declined(f"shape {shape} does not hold {size} elements", node)
    return shape


def _flatten(facts: Facts, node: ir.Node, dims: Dims) -> Moves:
    axis = integer_attribute(node, "axis", 1)
    axis = axis + len(dims) if axis < 0 else axis
    return (Regroup((total_of(dims[:axis]), total_of(dims[axis:]))),)


def _expand(facts: Facts, node: ir.Node, dims: Dims) -> Moves:
    target = integers_of(facts, node.inputs[1])
    if target is None:
        raise Declined("the shape depends on an input", node, remedy=CONSTANT)
    return (Repeat(target.sizes),)


def _tile(facts: Facts, node: ir.Node, dims: Dims) -> Moves:
    counts = static(facts, node, 1)
    if counts is None or len(counts) != len(dims):
        raise Declined("the repetitions depend on an input", node, remedy=CONSTANT)
    return (Repeat(tuple(map(Size, counts)), tiled=True),)


def _known(size: Size, node: ir.Node) -> int:
    if size.constant is None:
        raise Declined("the extent of an axis is unknown", node)
    return size.constant


_Reader = Callable[[Facts, ir.Node, Dims], Moves | Mapping[ir.Value, Moves] | Mapping[ir.Value, Parts]]
_READERS: Mapping[str, _Reader] = {
    "Identity": _identity,
    "Transpose": _transpose,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Slice": _slice,
    "Split": _split,
    "SplitToSequence": _split_to_sequence,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Expand": _expand,
    "Tile": _tile,
}
OPERATORS = tuple(_READERS)
"""The movement operators; of a sequence, SequenceAt takes one part."""
