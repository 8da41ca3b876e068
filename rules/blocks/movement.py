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
from rewriter.rules.blocks.activations import as_features
from rewriter.rules.blocks.axes import (
    ONE,
    Atom,
    Axes,
    Dim,
    Located,
    Size,
    feature,
    put,
    reshape,
    tokens,
    total,
)
from rewriter.rules.blocks.contents import Tokens
from rewriter.rules.blocks.guards import integer_attribute, integers_attribute
from rewriter.rules.blocks.sizes import Integers, integers_of, reshaped, shape_of, static
from rewriter.tensors import View

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
    return Located(Tokens(value), (*tokens(dims[:-1]), feature(last)))


def cut_at(data: Located, axis: int, start: int, count: int, step: int = 1) -> Located | None:
    """Returns evenly stepping positions along one dimension, which stays; one position fixes its index."""
    dim = data.axes[axis]
    if (start, count, step) == (0, total(dim).constant, 1):
        return data
    if count == 1:
        return pick(data, axis, start)
    if len(dim) != 1:
        return None
    part = (as_features(data.content) or data.content).part(dim[0], start, count, step)
    if part is None:
        return None
    return Located(part, put(data.axes, axis, (replace(dim[0], size=Size(count)),)))


def pick(data: Located, axis: int, position: int) -> Located | None:
    """Returns one position along a dimension, which stays with extent 1."""
    dim = data.axes[axis]
    if not dim:
        return data
    fixed = data.content.fix(dim[0], position) if len(dim) == 1 else None
    return None if fixed is None else Located(fixed, put(data.axes, axis, ()))


class Movement(Recogniser):
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
        try:
            return None if located is None else self.move(facts, located, node)
        except (IndexError, ValueError, ZeroDivisionError):  # operands that the operator itself would refuse
            return None

    def sizes(self, facts: Facts, sizes: Integers, node: ir.Node) -> Moved:
        return None

    def move(self, facts: Facts, data: Located, node: ir.Node) -> Moved:
        raise NotImplementedError


class Identity(Movement):
    """The same."""

    roots = True

    def sizes(self, facts: Facts, sizes: Integers, node: ir.Node) -> Integers:
        return sizes

    def move(self, facts: Facts, data: Located, node: ir.Node) -> Located:
        return data


class Transpose(Movement):
    """Any permutation; without ``perm`` the dimensions are reversed."""

    def move(self, facts: Facts, data: Located, node: ir.Node) -> Located:
        perm = integers_attribute(node, "perm", range(data.rank)[::-1])
        return replace(data, axes=tuple(data.axes[p] for p in perm))


class Unsqueeze(Movement):
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
        if len(at) != len(new):
            return None
        kept = iter(data.axes)
        return replace(data, axes=tuple(() if i in at else next(kept) for i in range(rank)))


class Squeeze(Movement):
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
            moved = pick(data, position, 0)
            if moved is None:
                return None
            data = replace(moved, axes=put(moved.axes, position))
        return data


class Reshape(Movement):
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


class Flatten(Movement):
    """Two dimensions, cut at an axis."""

    def move(self, facts: Facts, data: Located, node: ir.Node) -> Located:
        axis = integer_attribute(node, "axis", 1)
        axis = axis + data.rank if axis < 0 else axis
        return replace(data, axes=(_joined(data.axes[:axis]), _joined(data.axes[axis:])))


def _joined(axes: Axes) -> Dim:
    return tuple(atom for dim in axes for atom in dim)


class Expand(Movement):
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


class Tile(Movement):
    """Repetitions in front of what they repeat."""

    roots = True

    def move(self, facts: Facts, data: Located, node: ir.Node) -> Located | None:
        counts = static(facts, node, 1)
        if counts is None or len(counts) != data.rank:
            return None
        pairs = zip(counts, data.axes, strict=True)
        return replace(data, axes=tuple((Atom("repeat", Size(n)), *dim) if n != 1 else dim for n, dim in pairs))


RECOGNISERS: tuple[Recogniser, ...] = (
    Identity(),
    Transpose(),
    Unsqueeze(),
    Squeeze(),
    Reshape(),
    Flatten(),
    Expand(),
    Tile(),
)
