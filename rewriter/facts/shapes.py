"""Shapes: the extents of a value as far as the graph tells them, and integers computed from shapes.

Facts stated: ``Integers``. ``shape_of`` answers for any value, on demand: what operators prove goes before what the
model declares; unknown dimensions that must be equal are the same symbol.
Source: Shape -> Gather -> Unsqueeze -> Concat -> Reshape, Expand and ConstantOfShape, as every exporter writes them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from rewriter.facts.facts import Facts
from rewriter.facts.family import Family
from rewriter.facts.integers import Shaped, integers_of, shaped, static
from rewriter.facts.moves import OPERATORS, Parts, moved, positions, read, slice_bounds
from rewriter.facts.size import ONE, Dims, Integers, Size, reshaped, total_of
from rewriter.graph.attributes import integer_attribute
from rewriter.graph.declines import Declined
from rewriter.operators.matmul_nbits import MATMUL_NBITS
from rewriter.tensors import View

sizes = Family("sizes")


@dataclass(frozen=True)
class _Shape:
    dims: Dims | None


def shape_of(facts: Facts, value: ir.Value) -> Dims | None:
    """Returns the extents of a value, or None where not even its rank is known."""
    chain: list[tuple[ir.Value, Callable[[Dims | None], Dims | None]]] = []
    at: ir.Value | None = value
    dims: Dims | None = None
    while at is not None:
        known = facts.kept(at, _Shape) or shaped(facts, at)
        if known is not None:
            dims = known.dims
            break
        parent, derive = _origin(facts, at)
        chain.append((at, derive))
        at = parent
    for link, derive in reversed(chain):
        dims = derive(dims)
        kept = dims = dims if dims is not None else _declared(link)
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
    if op_type in OPERATORS and not node.domain:
        return first, functools.partial(_moved, facts, value, node)
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


def _moved(facts: Facts, value: ir.Value, node: ir.Node, dims: Dims | None) -> Dims | None:
    """The extents behind a movement operator."""
    try:
        if dims is None:
            target = integers_of(facts, node.inputs[1]) if node.op_type == "Reshape" else None
            keep = not integer_attribute(node, "allowzero", 0)
            return None if target is None else reshaped(None, target.sizes, keep_zeros=keep)
        if node.op_type == "Slice":
            return _sliced(facts, value, node, dims)
        moves = read(facts, node, dims)[value]
    except (Declined, IndexError, ValueError, ZeroDivisionError):
        return None
    return None if isinstance(moves, Parts) else moved(dims, moves)


def _sliced(facts: Facts, value: ir.Value, node: ir.Node, dims: Dims) -> Dims:
    """The extents of a Slice: those along other axes stay, whatever is known of one that is cut."""
    sliced = list(dims)
    for axis, bounds in slice_bounds(facts, node):
        extent = dims[axis].constant
        if bounds is not None and extent is not None:
            sliced[axis] = Size(len(positions(*bounds, extent)))
        else:
            declared = _declared(value)
            sliced[axis] = declared[axis] if declared is not None else Size(1, ((value, axis % len(dims)),))
    return tuple(sliced)


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


def fed_shape(dims: Dims) -> tuple[tuple[int, tuple[str, ...]], ...]:
    """Returns a shape with its unknowns as the model, or the proof, calls them; see ``rewriter.rule.Fed``."""
    return tuple(
        (size.factor, tuple(s if isinstance(s, str) else f"{s[0].name}:{s[1]}" for s in size.symbols)) for size in dims
    )


@sizes.at("Shape")
def shape(facts: Facts, node: ir.Node, value: ir.Value) -> Integers | None:
    """All extents of a value, or a run of them."""
    dims = shape_of(facts, value)
    if dims is None:
        return None
    start = integer_attribute(node, "start", 0)
    end = integer_attribute(node, "end", len(dims))
    return Integers(dims[start:end])


@sizes.at("Concat")
def concatenated(facts: Facts, node: ir.Node, *vectors: ir.Value | None) -> Integers | None:
    """Vectors of sizes, one after the other."""
    if not any(v is not None and facts.get(v, Integers) is not None for v in vectors):
        return None
    parts = [part.sizes for value in vectors if (part := integers_of(facts, value)) is not None]
    return Integers(tuple(size for part in parts for size in part)) if len(parts) == len(vectors) else None


@dataclass(frozen=True)
class Row(Shaped):
    """Sizes in a matrix of one row.

    Attributes:
        sizes: one for each column.
    """

    sizes: Dims

    @property
    def dims(self) -> Dims:
        """[1, columns]."""
        return ONE, Size(len(self.sizes))


@sizes.at("OneHot")
def one_hot(facts: Facts, node: ir.Node, index: ir.Value, depth: ir.Value, values: ir.Value) -> Row | None:
    """One size in the place of one index, and another elsewhere: what TorchScript repeats a dimension by."""
    at, count, pair = static(facts, node, 0), static(facts, node, 1), integers_of(facts, values)
    if at is None or count is None or pair is None or (len(at), len(count), len(pair.sizes)) != (1, 1, 2):
        return None
    known = integers_of(facts, index)
    if known is None or known.scalar or integer_attribute(node, "axis", -1) not in (-1, 1):
        return None
    return Row(tuple(pair.sizes[int(column == at[0] % count[0])] for column in range(count[0])))


@sizes.at("Reshape")
def flat(facts: Facts, node: ir.Node, row: ir.Value, shape: ir.Value) -> Integers | None:
    """A row as a vector."""
    held, target = facts.get(row, Row), static(facts, node, 1)
    return Integers(held.sizes) if held is not None and target in ([-1], [len(held.sizes)]) else None
