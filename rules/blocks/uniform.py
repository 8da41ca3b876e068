"""One number everywhere: zeros in a shape that is known, which sums and scatters begin with.

Fact stated: ``Located`` with content ``Uniform``.
Source: ConstantOfShape(Shape(x)), Expand(0, shape), with a Cast or CastLike behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from rewriter.facts import Facts, Recogniser
from rewriter.rules.blocks.axes import Atom, Axes, Located, Size, Uniform, total
from rewriter.rules.blocks.sizes import integers_of
from rewriter.tensors import View


def seeded(seed: Located, other: Located) -> Axes | None:
    """Returns the axes of zeros plus ``other`` where the zeros enlarge nothing."""
    if seed.content != Uniform(0.0) or seed.rank > other.rank:
        return None
    lead = other.axes[other.rank - seed.rank :]
    fits = all(not dim or total(dim) == total(own) for dim, own in zip(seed.axes, lead, strict=True))
    return other.axes if fits else None


class ConstantOfShape(Recogniser):
    """One number in a shape that is known."""

    def pattern(self, op: Any, shape: Any) -> Any:
        return op.ConstantOfShape(shape, _outputs=["out"])

    def recognise(self, facts: Facts, *, shape: ir.Value, out: ir.Value) -> Located | None:
        node = out.producer()
        attribute = None if node is None else node.attributes.get("value")
        number = 0.0 if attribute is None else float(attribute.as_tensor().numpy().reshape(-1)[0])
        sizes = integers_of(facts, shape)
        return None if sizes is None else Located(Uniform(number), repeated(sizes.sizes))


class ExpandedNumber(Recogniser):
    """A constant scalar expanded to a shape that is known."""

    def pattern(self, op: Any, number: Any, shape: Any) -> Any:
        return op.Expand(number, shape, _outputs=["out"])

    def recognise(self, facts: Facts, *, number: ir.Value, shape: ir.Value, out: ir.Value) -> Located | None:
        sizes, value = integers_of(facts, shape), uniform_of(facts, number)
        return None if sizes is None or value is None else Located(Uniform(value), repeated(sizes.sizes))


class SameNumber(Recogniser):
    """A cast of one number, to the type of another value too."""

    def __init__(self, op_type: str) -> None:
        super().__init__(name=op_type)
        self._op_type = op_type

    def pattern(self, op: Any, number: Any) -> Any:
        return getattr(op, self._op_type)(number, _allow_other_inputs=True, _outputs=["out"])

    def recognise(self, facts: Facts, *, number: ir.Value, out: ir.Value) -> Located | None:
        located, value = facts.get(number, Located), uniform_of(facts, number)
        if value is None or value not in (0.0, 1.0):
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


RECOGNISERS: tuple[Recogniser, ...] = (
    ConstantOfShape(),
    ExpandedNumber(),
    SameNumber("Cast"),
    SameNumber("CastLike"),
)
