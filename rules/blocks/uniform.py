"""One number everywhere: zeros in a shape that is known, which sums and scatters begin with.

Fact stated: ``Located`` with content ``Uniform``.
Source: ConstantOfShape(Shape(x)), Expand(0, shape), with a Cast or CastLike behind.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence

import onnx_ir as ir

from rewriter.facts import Facts, Family
from rewriter.facts.integers import integers_of
from rewriter.facts.size import Size
from rewriter.graph.attributes import cast_type
from rewriter.rules.blocks.axes import Atom, Axes, Content, Located, Uniform, total, unify
from rewriter.rules.blocks.laws import of_number, of_two
from rewriter.tensors import View

numbers = Family("numbers")
_COMPARED = {"Greater": operator.gt, "GreaterOrEqual": operator.ge, "Less": operator.lt, "LessOrEqual": operator.le}
NOTHING = -1e30
"""A logit that no softmax, and no sigmoid, makes anything of; exporters write minus infinity, or the least number."""


def seeded(seed: Located, other: Located) -> Axes | None:
    """Returns the axes of zeros plus ``other`` where the zeros enlarge nothing."""
    if seed.content != Uniform(0.0) or seed.rank > other.rank:
        return None
    lead = other.axes[other.rank - seed.rank :]
    fits = all(not dim or total(dim) == total(own) for dim, own in zip(seed.axes, lead, strict=True))
    return other.axes if fits else None


@of_two.at("Add")
def zeros_plus(a: Located, b: Located, node: ir.Node) -> Content | None:
    """Returns what is added to zeros."""
    return b.content if isinstance(a.content, Uniform) and seeded(a, b) is not None else None


@of_two.at("Sub")
def minus_zeros(a: Located, b: Located, node: ir.Node) -> Content | None:
    """Returns what zeros are taken from."""
    return a.content if seeded(b, a) is not None else None


@numbers.at("ConstantOfShape")
def constant_of_shape(facts: Facts, node: ir.Node, shape: ir.Value) -> Located | None:
    """One number in a shape that is known."""
    attribute = None if node is None else node.attributes.get("value")
    number = 0.0 if attribute is None else float(attribute.as_tensor().numpy().reshape(-1)[0])
    sizes = integers_of(facts, shape)
    return None if sizes is None else Located(Uniform(number), repeated(sizes.sizes))


@numbers.at("Expand")
def expanded_number(facts: Facts, node: ir.Node, number: ir.Value, shape: ir.Value) -> Located | None:
    """A constant scalar expanded to a shape that is known."""
    sizes, value = integers_of(facts, shape), uniform_of(facts, number)
    return None if sizes is None or value is None else Located(Uniform(value), repeated(sizes.sizes))


@numbers.at("Cast", "CastLike")
def same_number(facts: Facts, node: ir.Node, number: ir.Value, *others: ir.Value | None) -> Located | None:
    """A cast of one number, to the type of another value too."""
    located, value = facts.get(number, Located), uniform_of(facts, number)
    to = cast_type(node) if node.op_type == "Cast" else others[0].dtype if others and others[0] is not None else None
    if value is None or (value not in (0.0, 1.0, -math.inf) and to not in (ir.DataType.FLOAT, ir.DataType.DOUBLE)):
        return None
    return dataclasses.replace(located, content=Uniform(value)) if located else Located(Uniform(value), ())


@numbers.at(*_COMPARED)
def compared(facts: Facts, node: ir.Node, a: ir.Value, b: ir.Value) -> Located | None:
    """Two constants compared, where nobody folded them."""
    first, second = (uniform_of(facts, value) if facts.get(value, View) is not None else None for value in (a, b))
    if first is None or second is None:
        return None
    return Located(Uniform(float(_COMPARED[node.op_type](first, second))), ())


@numbers.at("Where")
def decided(facts: Facts, node: ir.Node, condition: ir.Value, yes: ir.Value, no: ir.Value) -> Located | None:
    """One of two values, where it is the same one everywhere."""
    always = facts.get(condition, Located)
    if always is None or not isinstance(always.content, Uniform):
        return None
    taken = facts.get(yes if always.content.value else no, Located)
    return None if taken is None or unify(taken.axes, always.axes) != taken.axes else taken


@of_number.at("Mul")
def times_number(a: Located, number: float, node: ir.Node) -> Content | None:
    """Returns one number times another."""
    return Uniform(a.content.value * number) if isinstance(a.content, Uniform) else None


def uniform_of(facts: Facts, value: ir.Value) -> float | None:
    """Returns the number that a value holds everywhere."""
    located, view = facts.get(value, Located), facts.get(value, View)
    if located is not None and isinstance(located.content, Uniform):
        return located.content.value
    if view is None or view.rank > 1 or view.size != 1 or view.dtype == ir.DataType.STRING:
        return None
    return view.number


def repeated(sizes: Sequence[Size]) -> Axes:
    """Returns the axes of something that depends on no index."""
    return tuple(() if size == Size() else (Atom("repeat", size),) for size in sizes)
