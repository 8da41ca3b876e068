"""Shapes: the extents of a value as far as the graph tells them, and integers computed from shapes.

Facts stated: ``Integers``. ``shape_of`` answers for any value, on demand: what operators prove goes before what the
model declares; unknown dimensions that must be equal are the same symbol.
Source: Shape -> Gather -> Unsqueeze -> Concat -> Reshape, Expand and ConstantOfShape, as every exporter writes them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from rewriter.facts.facts import Facts
from rewriter.facts.family import Family
from rewriter.facts.integers import Shaped, integers_of, shaped, static
from rewriter.facts.moves import OPERATORS, Parts, moved, positions, read, slice_bounds
from rewriter.facts.size import ONE, Dims, Integers, Size, reshaped, total_of
from rewriter.graph.attributes import integer_attribute, text_attribute
from rewriter.graph.declines import FOLDED, Declined
from rewriter.operators.matmul_nbits import MATMUL_NBITS
from rewriter.tensors import View

sizes = Family("sizes")


@dataclass(frozen=True)
class _Shape:
    dims: Dims | None


_Origin = tuple[tuple[ir.Value, ...], Callable[..., Dims | None]]
"""The values that a shape follows from, and how it follows from theirs."""


def shape_of(facts: Facts, value: ir.Value) -> Dims | None:
    """Returns the extents of a value, or None where not even its rank is known."""
    known = _known(facts, value)
    waiting: list[tuple[ir.Value, _Origin]] = [] if known else [(value, _origin(facts, value))]
    while waiting:
        at, (parents, derive) = waiting[-1]
        unknown = [parent for parent in parents if _known(facts, parent) is None]
        if unknown:
            waiting.extend((parent, _origin(facts, parent)) for parent in unknown)
            continue
        waiting.pop()
        dims = derive(*(held.dims for parent in parents if (held := _known(facts, parent))))
        known = facts.derived(at, _Shape, lambda at=at, dims=dims: _Shape(_declared(at) if dims is None else dims))  # type: ignore[misc]
    return None if known is None else known.dims


def _known(facts: Facts, value: ir.Value) -> _Shape | Shaped | None:
    return facts.kept(value, _Shape) or shaped(facts, value)


def _declared(value: ir.Value) -> Dims | None:
    """What the model says of a value; an unnamed dimension is a symbol of its own."""
    if value.shape is None:
        return None
    return tuple(
        Size.of(d) if isinstance(d, int) else _named(d.value) if d.value else Size(1, ((value, i),))
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
_BROADCAST = frozenset({
    "Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Where", "Greater", "GreaterOrEqual", "Less", "LessOrEqual",
    "Equal", "And", "Or",
})  # fmt: skip
_FULL_OUTPUTS = {"SkipSimplifiedLayerNormalization": (0, 3), "SkipLayerNormalization": (0, 3)}


def _origin(facts: Facts, value: ir.Value) -> _Origin:
    view = facts.get(value, View)
    if view is not None:
        return (), lambda: tuple(map(Size.of, view.shape))
    node = value.producer()
    if node is None or not node.inputs or node.inputs[0] is None:
        return (), lambda: _declared(value)
    first, op_type = node.inputs[0], node.op_type
    if op_type in _SAME and value.index() in _FULL_OUTPUTS.get(op_type, (0,)):
        return (first,), lambda dims: dims
    if op_type in ("MatMul", "Gemm") and len(node.inputs) > 1:
        weight = facts.get(node.inputs[1], View)
        if weight is not None and weight.rank == 2 and not integer_attribute(node, "transA", 0):
            columns = weight.shape[0 if integer_attribute(node, "transB", 0) else 1]
            return (first,), lambda dims: None if dims is None else (*dims[:-1], Size(columns))
    if op_type == MATMUL_NBITS.name:
        return (first,), lambda dims: None if dims is None else (*dims[:-1], Size(integer_attribute(node, "N", 0)))
    if op_type in _BROADCAST and not node.domain:
        return tuple(v for v in node.inputs if v is not None), functools.partial(_broadcast, value)
    if op_type in OPERATORS and not node.domain:
        return (first,), functools.partial(_moved, facts, value, node)
    return (), lambda: _declared(value)


def _broadcast(value: ir.Value, *operands: Dims | None) -> Dims | None:
    """The extents of an elementwise result; what the operands leave open is as it is declared."""
    known, declared = [dims for dims in operands if dims is not None], _declared(value)
    every = len(known) == len(operands)
    rank = max(map(len, known)) if every else len(declared or ())
    if every and (declared is None or len(declared) != rank):
        declared = tuple(Size(1, ((value, i),)) for i in range(rank))
    if declared is None or any(len(dims) > rank for dims in known):
        return declared
    padded = ((ONE,) * (rank - len(dims)) + dims for dims in known)
    return tuple(_widest(set(column), every=every) or own for *column, own in zip(*padded, declared, strict=True))


def _widest(sizes: set[Size], *, every: bool) -> Size | None:
    """The extent that these broadcast to; None where it cannot be told. ``every``: these are all operands."""
    wide = sizes - {ONE}
    constant = [size for size in wide if size.constant is not None]
    if constant:
        return constant[0]
    return None if not every or len(wide) > 1 else next(iter(wide), ONE)


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


@sizes.at("Size")
def size(facts: Facts, node: ir.Node, value: ir.Value) -> Integers | None:
    """How many elements a value has; those of a shape are as many as there are dimensions."""
    dims = shape_of(facts, value)
    return None if dims is None else Integers((total_of(list(dims)),), scalar=True)


@sizes.at("If")
def decided(facts: Facts, node: ir.Node, condition: ir.Value) -> None:
    """An If that takes one branch whatever the input is: what it returns is known once that is folded.

    Raises:
        Declined: it is one.
    """
    if facts.get(condition, View) is not None or facts.get(condition, Integers) is not None:
        raise Declined("an If stands there whose condition is the same for every input", node, remedy=FOLDED)


@sizes.at("Concat")
def concatenated(facts: Facts, node: ir.Node, *vectors: ir.Value | None) -> Integers | None:
    """Vectors of sizes, one after the other."""
    if not any(v is not None and facts.get(v, Integers) is not None for v in vectors):
        return None
    parts = [part.sizes for value in vectors if (part := integers_of(facts, value)) is not None]
    return Integers(tuple(size for part in parts for size in part)) if len(parts) == len(vectors) else None


@sizes.at("ScatterElements")
def replaced(facts: Facts, node: ir.Node, vector: ir.Value, index: ir.Value, others: ir.Value) -> Integers | None:
    """Some sizes of a vector in the place of others."""
    known, at, new = facts.get(vector, Integers), static(facts, node, 1), integers_of(facts, others)
    if known is None or known.scalar or at is None or new is None or len(at) != len(new.sizes):
        return None
    if text_attribute(node, "reduction", "none") != "none" or not all(
        -len(known.sizes) <= i < len(known.sizes) for i in at
    ):
        return None
    changed = list(known.sizes)
    for i, size in zip(at, new.sizes, strict=True):
        changed[i] = size
    return Integers(tuple(changed))


@sizes.at("Equal")
def equal(facts: Facts, node: ir.Node, a: ir.Value, b: ir.Value) -> Integers | None:
    """``Equal`` of sizes, as 0 and 1, where the answer is known for every element; no extent is negative."""
    x, y = integers_of(facts, a), integers_of(facts, b)
    if x is None or y is None or len(x.sizes) != len(y.sizes) or x.scalar != y.scalar:
        return None
    told = [_same(one, other) for one, other in zip(x.sizes, y.sizes, strict=True)]
    return None if None in told else Integers(tuple(Size(int(bool(each))) for each in told), x.scalar)


def _same(a: Size, b: Size) -> bool | None:
    if a == b:
        return True
    if a.constant is not None and b.constant is not None:
        return False
    return False if min(a.factor, b.factor) < 0 <= max(a.factor, b.factor) else None


@sizes.at("Where")
def either(facts: Facts, node: ir.Node, condition: ir.Value, yes: ir.Value, no: ir.Value) -> Integers | None:
    """Sizes of one vector or of another, element by element."""
    chosen, known = facts.get(condition, Integers), [integers_of(facts, value) for value in (yes, no)]
    first, second = known
    if chosen is None or first is None or second is None or chosen.scalar:
        return None
    if not len(chosen.sizes) == len(first.sizes) == len(second.sizes):
        return None
    picks = zip(chosen.sizes, first.sizes, second.sizes, strict=True)
    return Integers(tuple(one if which.constant else other for which, one, other in picks))


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
