"""One number everywhere: zeros in a shape that is known, which sums and scatters begin with.

Fact stated: ``Located`` with content ``Uniform``.
Source: ConstantOfShape(Shape(x)), Expand(0, shape), with a Cast or CastLike behind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from rewriter.facts import Facts, Family
from rewriter.facts.integers import integers_of
from rewriter.facts.size import Size
from rewriter.rules.blocks.axes import Atom, Axes, Content, Located, Uniform, total
from rewriter.rules.blocks.laws import of_two
from rewriter.tensors import View

numbers = Family("numbers")


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
    if value is None or value not in (0.0, 1.0, -math.inf):
        return None
    return located or Located(Uniform(value), ())


def uniform_of(facts: Facts, value: ir.Value) -> float | None:
    """Returns the number that a value holds everywhere."""
    located, view = facts.get(value, Located), facts.get(value, View)
    if located is not None and isinstance(located.content, Uniform):
        return located.content.value
    if view is None or view.rank or view.dtype == ir.DataType.STRING:
        return None
    return float(np.asarray(view.numpy()).reshape(-1)[0])


def repeated(sizes: Sequence[Size]) -> Axes:
    """Returns the axes of something that depends on no index."""
    return tuple(() if size == Size() else (Atom("repeat", size),) for size in sizes)
