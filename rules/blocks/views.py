"""Views: a chain of movement operators over a constant, with constant operands, shows part of that constant.

Fact stated: ``rewriter.tensors.View``. Operands may be static but computed (``recognise.computed``).
Source: mobius, torch.onnx (dynamo and TorchScript), transformers' exporter, ONNX Runtime's model builder.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from rewriter.facts import Facts, Recogniser
from rewriter.graph.declines import CONSTANT
from rewriter.rule import Declined
from rewriter.rules.blocks.guards import cast_type, integer_attribute, integers, integers_attribute
from rewriter.tensors import View

_FAR = (2**31 - 1, 2**63 - 1)


@dataclass(frozen=True)
class Views:
    """The views in a sequence that SplitToSequence made."""

    items: tuple[View, ...]


class _Movement(Recogniser):
    """``Op(stack, operands...)``: the stack must be a view; ``show`` says which view each output is."""

    def pattern(self, op: Any, stack: Any) -> Any:
        return getattr(op, type(self).__name__)(stack, _allow_other_inputs=True, _outputs=["out"])

    def recognise(self, facts: Facts, *, stack: ir.Value, out: ir.Value) -> object | Mapping[ir.Value, object] | None:
        view = facts.get(stack, View)
        node = out.producer()
        if view is None and facts.why_not(stack):
            raise Declined(facts.why_not(stack), node)
        if view is None or node is None:
            return None
        try:
            return self.show(facts, view, node)
        except (IndexError, ValueError, ZeroDivisionError) as error:  # no runtime computes this either
            raise Declined(f"its operands do not fit a constant of shape {list(view.shape)}", node) from error

    def show(self, facts: Facts, view: View, node: ir.Node) -> object | Mapping[ir.Value, object] | None:
        raise NotImplementedError


class Identity(_Movement):
    """Shows what it is given."""

    def show(self, facts: Facts, view: View, node: ir.Node) -> View | None:
        return view


class Gather(_Movement):
    """One index, or indices that step evenly, along one axis."""

    def show(self, facts: Facts, view: View, node: ir.Node) -> View | None:
        if not view.rank:
            return None
        axis = integer_attribute(node, "axis", 0) % view.rank
        indices = facts.get(node.inputs[1], View)
        if indices is None:
            raise Declined("the index depends on an input", node, remedy=CONSTANT)
        if indices.rank > 1:
            raise Declined(f"the indices have rank {indices.rank}; a view takes one index or a run of them", node)
        extent = view.shape[axis]
        where = [int(i) + (extent if i < 0 else 0) for i in indices.numpy().reshape(-1).tolist()]
        if not all(0 <= i < extent for i in where):
            raise Declined(f"index {where} is outside axis {axis} of extent {extent}", node)
        if indices.rank == 0:
            return view.index(axis, where[0])
        step = where[1] - where[0] if len(where) > 1 else 1
        if not where or any(b - a != step for a, b in itertools.pairwise(where)):
            raise Declined("the indices do not step evenly", node)
        return view.slice(axis, where[0], len(where), step)


class GatherND(_Movement):
    """One index tuple over the first axes, or evenly stepping indices along the first."""

    def show(self, facts: Facts, view: View, node: ir.Node) -> View | None:
        indices = facts.get(node.inputs[1], View)
        if indices is None:
            raise Declined("the index depends on an input", node, remedy=CONSTANT)
        depth = indices.shape[-1] if indices.rank else 0
        if integer_attribute(node, "batch_dims", 0) or indices.size != depth or not 0 < depth <= view.rank:
            raise Declined("a view takes one index tuple", node)
        shown = view
        for position in indices.numpy().reshape(-1).tolist():
            extent = shown.shape[0]
            if not -extent <= position < extent:
                raise Declined(f"index {position} is outside an axis of extent {extent}", node)
            shown = shown.index(0, position % extent)
        return shown.reshape((*indices.shape[:-1], *shown.shape))


class Slice(_Movement):
    """Constant bounds and steps, as inputs or (before opset 10) as attributes."""

    def show(self, facts: Facts, view: View, node: ir.Node) -> View | None:
        starts = integers(facts, node, 1, "starts")
        ends = integers(facts, node, 2, "ends")
        if starts is None or ends is None:
            raise Declined("the bounds depend on an input", node, remedy=CONSTANT)
        axes = integers(facts, node, 3, "axes", range(len(starts)))
        steps = integers(facts, node, 4, "", [1] * len(starts))
        if axes is None or steps is None:
            raise Declined("the axes or steps depend on an input", node, remedy=CONSTANT)
        shown = view
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
            extent = shown.shape[axis]
            if step < 0 and end in _FAR:
                raise Declined("it runs backwards to INT_MAX, which runtimes read in different ways", node)
            run = _positions(start, end, step, extent)
            shown = shown.slice(axis % view.rank, run.start, len(run), run.step)
        return shown


class Split(_Movement):
    """Equal parts (``num_outputs``, or just the outputs there are) or constant lengths."""

    def show(self, facts: Facts, view: View, node: ir.Node) -> Mapping[ir.Value, View]:
        axis = integer_attribute(node, "axis", 0) % view.rank
        count = len(node.outputs)
        chunk = -(-view.shape[axis] // count)
        even = [max(0, min(chunk, view.shape[axis] - i * chunk)) for i in range(count)]
        lengths = integers(facts, node, 1, "split", even)
        if lengths is None:
            raise Declined("the lengths depend on an input", node, remedy=CONSTANT)
        if sum(lengths) != view.shape[axis] or len(lengths) != count or min(lengths) < 0:
            raise Declined(f"lengths {lengths} do not make up extent {view.shape[axis]}", node)
        return {out: view.slice(axis, s, n) for out, s, n in zip(node.outputs, _starts(lengths), lengths, strict=True)}


class SplitToSequence(_Movement):
    """Pieces of length one along an axis, kept or dropped, as a sequence."""

    def show(self, facts: Facts, view: View, node: ir.Node) -> Views | None:
        axis = integer_attribute(node, "axis", 0) % view.rank
        if len(node.inputs) > 1 and node.inputs[1] is not None:
            raise Declined("only pieces of length one are views", node)
        if integer_attribute(node, "keepdims", 1):
            return Views(tuple(view.slice(axis, i, 1) for i in range(view.shape[axis])))
        return Views(tuple(view.index(axis, i) for i in range(view.shape[axis])))


class SequenceAt(_Movement):
    """One piece of a sequence of views."""

    def recognise(self, facts: Facts, *, stack: ir.Value, out: ir.Value) -> View | None:
        views = facts.get(stack, Views)
        node = out.producer()
        if views is None or node is None:
            return None
        position = facts.get(node.inputs[1], View)
        if position is None:
            raise Declined("the position depends on an input", node, remedy=CONSTANT)
        where = int(position.numpy().item())
        return views.items[where] if -len(views.items) <= where < len(views.items) else None


class Squeeze(_Movement):
    """Constant axes, or every axis of extent 1."""

    def show(self, facts: Facts, view: View, node: ir.Node) -> View | None:
        axes = integers(facts, node, 1, "axes", [i for i, d in enumerate(view.shape) if d == 1])
        if axes is None:
            raise Declined("the axes depend on an input", node, remedy=CONSTANT)
        gone = {a % view.rank for a in axes}
        if any(view.shape[a] != 1 for a in gone):
            raise Declined(f"an axis of {axes} is not of extent 1", node)
        return view.reshape([d for i, d in enumerate(view.shape) if i not in gone])


class Unsqueeze(_Movement):
    """Constant axes."""

    def show(self, facts: Facts, view: View, node: ir.Node) -> View | None:
        axes = integers(facts, node, 1, "axes")
        if axes is None:
            raise Declined("the axes depend on an input", node, remedy=CONSTANT)
        rank = view.rank + len(axes)
        new = {a % rank for a in axes}
        if len(new) != len(axes):
            raise Declined(f"axes {axes} name one twice", node)
        kept = iter(view.shape)
        return view.reshape([1 if i in new else next(kept) for i in range(rank)])


class Transpose(_Movement):
    """Any permutation; without ``perm`` the dimensions are reversed."""

    def show(self, facts: Facts, view: View, node: ir.Node) -> View | None:
        return view.transpose(integers_attribute(node, "perm", range(view.rank)[::-1]))


class Reshape(_Movement):
    """A constant shape, with 0 and -1 as the operator means them."""

    def show(self, facts: Facts, view: View, node: ir.Node) -> View | None:
        shape = integers(facts, node, 1, "shape")
        if shape is None:
            raise Declined("the shape depends on an input", node, remedy=CONSTANT)
        if not integer_attribute(node, "allowzero", 0):
            shape = [view.shape[i] if d == 0 else d for i, d in enumerate(shape)]
        known = math.prod(d for d in shape if d != -1)
        if -1 in shape and not known:
            raise Declined(f"-1 has no one value in shape {shape}", node)
        shape = [view.size // known if d == -1 else d for d in shape]
        if math.prod(shape) != view.size:
            raise Declined(f"shape {shape} does not hold {view.size} elements", node)
        return view.reshape(shape)


class Flatten(_Movement):
    """Two dimensions, split at an axis."""

    def show(self, facts: Facts, view: View, node: ir.Node) -> View | None:
        axis = integer_attribute(node, "axis", 1)
        axis = axis + view.rank if axis < 0 else axis
        return view.reshape((math.prod(view.shape[:axis]), math.prod(view.shape[axis:])))


class Cast(_Movement):
    """A cast that keeps every value: a widening one."""

    def show(self, facts: Facts, view: View, node: ir.Node) -> View | None:
        to = cast_type(node)
        if to is None:
            return None
        shown = view.cast(to)
        if shown is None and view.dtype.is_floating_point():
            raise Declined(f"the cast from {view.dtype.name} to {to.name} rounds", node)
        return shown


def _positions(start: int, end: int, step: int, extent: int) -> range:
    """The positions that Slice takes: as in Python, but a start before the first backwards is the first."""
    low, high = (0, extent) if step > 0 else (-1, extent - 1)
    start, end = (bound + extent if bound < 0 else bound for bound in (start, end))
    return range(min(max(start, 0), high), min(max(end, low), high), step)


def _starts(lengths: Sequence[int]) -> list[int]:
    starts, total = [], 0
    for length in lengths:
        starts.append(total)
        total += length
    return starts


RECOGNISERS: tuple[Recogniser, ...] = (
    Identity(),
    Gather(),
    GatherND(),
    Slice(),
    Split(),
    SplitToSequence(),
    SequenceAt(),
    Squeeze(),
    Unsqueeze(),
    Transpose(),
    Reshape(),
    Flatten(),
    Cast(),
)
