"""Sizes: the shape of a value as far as the graph tells it, and integers computed from shapes.

Facts stated: ``Integers``. ``shape_of`` answers for any value, on demand: what operators prove goes before what the
model declares; unknown dimensions that must be equal are the same symbol.
Source: Shape -> Gather -> Unsqueeze -> Concat -> Reshape, Expand and ConstantOfShape, as every exporter writes them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from rewriter.facts import Facts, Recogniser
from rewriter.operators.matmul_nbits import MATMUL_NBITS
from rewriter.rules.blocks.axes import ONE, Located, Size, Uniform, total
from rewriter.rules.blocks.guards import integer_attribute, integers_attribute
from rewriter.tensors import View

Dims = tuple[Size, ...]
_SMALL = 4096


@dataclass(frozen=True)
class Integers:
    """A scalar or a vector of sizes.

    Attributes:
        sizes: one for each element.
        scalar: whether it has rank 0.
    """

    sizes: Dims
    scalar: bool = False


@dataclass(frozen=True)
class _Shape:
    dims: Dims | None


def integers_of(facts: Facts, value: ir.Value | None) -> Integers | None:
    """Returns the integers that ``value`` holds, constant or computed from shapes."""
    if value is None:
        return None
    known = facts.get(value, Integers)
    if known is not None:
        return known
    located = facts.get(value, Located)
    if located is not None and isinstance(located.content, Uniform) and located.rank == 1:
        count = total(located.axes[0]).constant
        number = located.content.value
        return Integers((Size(int(number)),) * count) if count is not None and number.is_integer() else None
    view = facts.get(value, View)
    if view is None or view.rank > 1 or view.size > _SMALL or not view.dtype.is_integer():
        return None
    return Integers(tuple(Size(int(i)) for i in view.numpy().reshape(-1).tolist()), view.rank == 0)


def static(
    facts: Facts, node: ir.Node, position: int, attribute: str = "", default: Sequence[int] | None = None
) -> list[int] | None:
    """Returns an integer operand (or, in older opsets, attribute) that no input can change; None where one can."""
    if attribute and attribute in node.attributes:
        return integers_attribute(node, attribute, ())
    if position >= len(node.inputs) or node.inputs[position] is None:
        return None if default is None else list(default)
    known = integers_of(facts, node.inputs[position])
    values = [size.constant for size in known.sizes] if known is not None else [None]
    return None if None in values else [v for v in values if v is not None]


def shape_of(facts: Facts, value: ir.Value) -> Dims | None:
    """Returns the extents of a value, or None where not even its rank is known."""
    chain: list[tuple[ir.Value, Callable[[Dims | None], Dims | None]]] = []
    at: ir.Value | None = value
    dims: Dims | None = None
    while at is not None:
        known = facts.kept(at, _Shape)
        located = facts.get(at, Located)
        if known is not None or located is not None:
            dims = known.dims if known is not None else tuple(total(dim) for dim in located.axes) if located else None
            break
        parent, derive = _origin(facts, at)
        chain.append((at, derive))
        at = parent
    for link, derive in reversed(chain):
        dims = derive(dims)
        if dims is None or facts.get(link, View) is None:
            dims = dims if dims is not None else _declared(link)
        kept = dims
        facts.derived(link, _Shape, lambda kept=kept: _Shape(kept))  # type: ignore[misc]
    return dims


def _declared(value: ir.Value) -> Dims | None:
    """What the model says of a value; an unnamed dimension is a symbol of its own."""
    if value.shape is None:
        return None
    return tuple(
        Size(d) if isinstance(d, int) else _named(d.value) if d.value else Size(1, ((value, i),))
        for i, d in enumerate(value.shape)
    )


def _named(name: str) -> Size:
    """The extent that torch.onnx names by a product, as ``2*s70*s72``; else the name is a symbol."""
    factors = name.split("*")
    if not all(factor.isidentifier() or factor.isdigit() for factor in factors):
        return Size(1, (name,))
    return total_of([Size(int(factor)) if factor.isdigit() else Size(1, (factor,)) for factor in factors])


_SAME = frozenset({
    "Cast", "Identity", "Softmax", "LogSoftmax", "Sigmoid", "Relu", "Gelu", "FastGelu", "QuickGelu", "Tanh", "Erf",
    "Neg", "Sqrt", "Reciprocal", "Exp", "Log", "Clip", "Softplus", "Dropout", "CumSum", "SimplifiedLayerNormalization",
    "RMSNormalization", "LayerNormalization", "SkipSimplifiedLayerNormalization", "SkipLayerNormalization",
    "LpNormalization", "CastLike", "Not", "Abs", "ScatterElements", "ScatterND",
})  # fmt: skip
_BINARY = frozenset({"Add", "Sub", "Mul", "Div", "Pow"})
_FULL_OUTPUTS = {"SkipSimplifiedLayerNormalization": (0, 3), "SkipLayerNormalization": (0, 3)}


def _origin(facts: Facts, value: ir.Value) -> tuple[ir.Value | None, Callable[[Dims | None], Dims | None]]:
    """The value that ``value``'s shape follows from, and how."""
    view = facts.get(value, View)
    if view is not None:
        return None, lambda _: tuple(Size(d) for d in view.shape)
    node = value.producer()
    if node is None or not node.inputs or node.inputs[0] is None:
        return None, lambda _: _declared(value)
    first, op_type = node.inputs[0], node.op_type
    if op_type in _SAME and value.index() in _FULL_OUTPUTS.get(op_type, (0,)):
        return first, lambda dims: dims
    if op_type in ("MatMul", "Gemm") and len(node.inputs) > 1:
        weight = facts.get(node.inputs[1], View)
        if weight is not None and weight.rank == 2 and not integer_attribute(node, "transA", 0):
            columns = weight.shape[0 if integer_attribute(node, "transB", 0) else 1]
            return first, lambda dims: None if dims is None else (*dims[:-1], Size(columns))
    if op_type == MATMUL_NBITS.name:
        return first, lambda dims: None if dims is None else (*dims[:-1], Size(integer_attribute(node, "N", 0)))
    if op_type in _BINARY and len(node.inputs) == 2:
        return _binary(facts, node)
    if op_type == "Where":
        return _where(facts, node)
    if op_type == "Slice":
        return first, functools.partial(_sliced, facts, value, node)
    if op_type == "Reshape":
        target = integers_of(facts, node.inputs[1])
        if target is not None:
            keep = not integer_attribute(node, "allowzero", 0)
            return first, lambda dims: reshaped(dims, target.sizes, keep_zeros=keep)
    return None, lambda _: _declared(value)


def _binary(facts: Facts, node: ir.Node) -> tuple[ir.Value | None, Callable[[Dims | None], Dims | None]]:
    """Elementwise with a constant that enlarges nothing."""
    for value, other in (node.inputs, node.inputs[::-1]):
        view = facts.get(other, View)
        if value is not None and view is not None:
            return value, functools.partial(_with_constant, view.shape)
    out = node.outputs[0]
    return node.inputs[0], lambda dims: _at_least(dims, _declared(out))


def _at_least(dims: Dims | None, declared: Dims | None) -> Dims | None:
    """The extents of an elementwise result: those that are declared, and those of an operand that nothing enlarges."""
    if dims is None or declared is None or len(dims) != len(declared):
        return declared
    known = zip(dims, declared, strict=True)
    return tuple(a if b.constant is None and a.constant not in (None, 1) else b for a, b in known)


def _sliced(facts: Facts, value: ir.Value, node: ir.Node, dims: Dims | None) -> Dims | None:
    """The extents of a Slice: those along other axes stay."""
    declared, starts, ends = _declared(value), static(facts, node, 1, "starts"), static(facts, node, 2, "ends")
    axes = static(facts, node, 3, "axes", range(len(starts or ())))
    if dims is None or not axes:
        return declared
    own = list(declared or (Size(1, ((value, i),)) for i in range(len(dims))))
    cut = {axis % len(dims): i for i, axis in enumerate(axes)}
    steps = static(facts, node, 4, "", [1] * len(axes))
    for axis, dim in enumerate(dims):
        if axis not in cut:
            own[axis] = dim
        elif starts and ends and steps and dim.constant is not None:
            start, end, step = (numbers[cut[axis]] for numbers in (starts, ends, steps))
            own[axis] = Size(len(range(*slice(start, end, step).indices(dim.constant)))) if step > 0 else own[axis]
    return tuple(own)


def _where(facts: Facts, node: ir.Node) -> tuple[ir.Value | None, Callable[[Dims | None], Dims | None]]:
    """A choice between numbers and values, or by a mask, of one shape."""
    condition, *others = (v for v in node.inputs if v is not None)
    wide = [v for v in others if (view := facts.get(v, View)) is None or view.size > 1]
    out = node.outputs[0]
    if len(wide) != 1:
        return None, lambda _: _declared(out)
    mask = shape_of(facts, condition)
    return wide[0], lambda dims: dims if dims is not None and mask == dims else None


def _with_constant(shape: Sequence[int], dims: Dims | None) -> Dims | None:
    if dims is None or len(shape) > len(dims):
        return None
    pairs = zip(reversed(shape), reversed(dims), strict=False)
    return dims if all(n in (1, dim.constant) for n, dim in pairs) else None


def reshaped(dims: Dims | None, target: Sequence[Size], *, keep_zeros: bool) -> Dims | None:
    """Returns the extents after a Reshape to ``target``, with 0 and -1 as the operator means them.

    Where ``dims`` is unknown, the target tells all but an extent of -1.
    """
    wanted: list[Size | None] = [None if size.constant == -1 else size for size in target]
    if wanted.count(None) > 1 or any(size is not None and size.factor < 0 for size in wanted):
        return None
    if keep_zeros:
        zeros = [i for i, size in enumerate(wanted) if size is not None and size.constant == 0]
        if zeros and (dims is None or zeros[-1] >= len(dims)):
            return None
        for i in zeros:
            wanted[i] = dims[i] if dims is not None else None
    if None not in wanted:
        return tuple(size for size in wanted if size is not None)
    if dims is None:
        return None
    rest: Size | None = total_of(dims)
    for size in wanted:
        rest = rest // size if rest is not None and size is not None else rest
    return None if rest is None else tuple(rest if size is None else size for size in wanted)


def total_of(dims: Sequence[Size]) -> Size:
    """Returns the number of elements."""
    size = ONE
    for dim in dims:
        size *= dim
    return size


class Shape(Recogniser):
    """``Shape(value)``, all of it or a run of its dimensions."""

    def pattern(self, op: Any, value: Any) -> Any:
        return op.Shape(value, _outputs=["out"])

    def recognise(self, facts: Facts, *, value: ir.Value, out: ir.Value) -> Integers | None:
        dims = shape_of(facts, value)
        node = out.producer()
        if dims is None or node is None:
            return None
        start = integer_attribute(node, "start", 0)
        end = integer_attribute(node, "end", len(dims))
        return Integers(dims[start:end])


class Concat(Recogniser):
    """Vectors of sizes, one after the other."""

    def pattern(self, op: Any, first: Any) -> Any:
        return op.Concat(first, _allow_other_inputs=True, _outputs=["out"])

    def recognise(self, facts: Facts, *, first: ir.Value, out: ir.Value) -> Integers | None:
        node = out.producer()
        if node is None or not any(v is not None and facts.get(v, Integers) is not None for v in node.inputs):
            return None
        parts = [part.sizes for value in node.inputs if (part := integers_of(facts, value)) is not None]
        return Integers(tuple(size for part in parts for size in part)) if len(parts) == len(node.inputs) else None


def fed_shape(dims: Dims) -> tuple[tuple[int, tuple[str, ...]], ...]:
    """Returns a shape with its unknowns as the model, or the proof, calls them; see ``rewriter.rule.Fed``."""
    return tuple(
        (size.factor, tuple(s if isinstance(s, str) else f"{s[0].name}:{s[1]}" for s in size.symbols)) for size in dims
    )


def arithmetic(op_type: str, a: Integers | None, b: Integers | None) -> Integers | None:
    """Returns the elementwise result of an operator on sizes, or None where it is not known."""
    if a is None or b is None:
        return None
    count = max(len(a.sizes), len(b.sizes))
    if {len(a.sizes), len(b.sizes)} - {1, count}:
        return None
    pairs = zip(a.sizes * (count // len(a.sizes)), b.sizes * (count // len(b.sizes)), strict=True)
    sizes = [_calculate(op_type, x, y) for x, y in pairs]
    return None if None in sizes else Integers(tuple(s for s in sizes if s is not None), a.scalar and b.scalar)


def _calculate(op_type: str, x: Size, y: Size) -> Size | None:
    if op_type == "Mul":
        return x * y
    if x.constant is None or y.constant is None:
        return x // y if op_type == "Div" else None
    if op_type == "Div":
        return None if not y.constant else Size(math.trunc(x.constant / y.constant))
    return Size(x.constant + y.constant if op_type == "Add" else x.constant - y.constant)


RECOGNISERS: tuple[Recogniser, ...] = (Shape(), Concat())
