"""Elementwise operators on located contents: each asks the laws of every family in turn.

Facts stated: ``Located``, ``Integers``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from rewriter.facts import Facts, Recogniser
from rewriter.rules.blocks.activations import as_features, number_of, power, product, summed, with_number
from rewriter.rules.blocks.axes import Content, Located, Uniform, unify
from rewriter.rules.blocks.biases import with_bias, with_chosen_bias
from rewriter.rules.blocks.combines import added, masked, masked_unknown, weighted
from rewriter.rules.blocks.mixing import Mask, Mixing, Share, Stack, Total
from rewriter.rules.blocks.movement import token_rows
from rewriter.rules.blocks.routers import bounded, divided, scaled, scaled_by_table, with_epsilon
from rewriter.rules.blocks.sizes import Integers, arithmetic, integers_of
from rewriter.rules.blocks.uniform import seeded
from rewriter.tensors import View

Law = Callable[[Content, Content], Content | None]


class _Elementwise(Recogniser):
    """``Op(a, b)``; laws for two contents, for a content and a constant, and for a content and anything."""

    commutes = True

    def pattern(self, op: Any, a: Any, b: Any) -> Any:
        return getattr(op, type(self).__name__)(a, b, _outputs=["out"])

    def recognise(self, facts: Facts, *, a: ir.Value, b: ir.Value, out: ir.Value) -> Located | Integers | None:
        node = out.producer()
        assert node is not None
        if facts.get(a, Integers) is not None or facts.get(b, Integers) is not None:
            return arithmetic(type(self).__name__, integers_of(facts, a), integers_of(facts, b))
        for first, second in ((a, b), (b, a)) if self.commutes else ((a, b),):
            found = self._ordered(facts, first, second, node)
            if found is not None:
                return found
        return None

    def _ordered(self, facts: Facts, a: ir.Value, b: ir.Value, node: ir.Node) -> Located | None:
        first, second = facts.get(a, Located), facts.get(b, Located)
        if first is not None and second is not None:
            axes = unify(first.axes, second.axes)
            found = None if axes is None else self.both(first, second, node)
            if found is not None and axes is not None:
                return Located(found, axes)
        view = facts.get(b, View)
        if first is not None and view is not None:
            found = self.constant(facts, first, b, view, node)
            return None if found is None else Located(found, first.axes)
        return None if facts.get(a, View) is not None else self.any(facts, a, first, second, node)

    def both(self, a: Located, b: Located, node: ir.Node) -> Content | None:
        return None

    def constant(self, facts: Facts, a: Located, b: ir.Value, view: View, node: ir.Node) -> Content | None:
        number = number_of(facts, b)
        if number is None or view.rank > a.rank:
            return None
        return self.number(a.content, number, node)

    def number(self, a: Content, number: float, node: ir.Node) -> Content | None:
        return with_number(type(self).__name__, a, number)

    def any(self, facts: Facts, value: ir.Value, a: Located | None, b: Located | None, node: ir.Node) -> Located | None:
        return None


class Mul(_Elementwise):
    """Products."""

    def both(self, a: Located, b: Located, node: ir.Node) -> Content | None:
        held, other = a.content, b.content
        if isinstance(other, Stack):
            return scaled_by_table(held, other, node)
        return product(held, other) or masked(held, other, node)

    def number(self, a: Content, number: float, node: ir.Node) -> Content | None:
        return scaled(a, number, node.outputs[0]) or with_number("Mul", a, number)

    def any(self, facts: Facts, value: ir.Value, a: Located | None, b: Located | None, node: ir.Node) -> Located | None:
        if b is not None and isinstance(b.content, Mask) and a is None:
            return Located(masked_unknown(b.content, node), b.axes)
        if b is None or not isinstance(b.content, Share | Mixing):
            return None
        rows = a or token_rows(facts, value)
        axes = b.axes if rows is None else unify(rows.axes, b.axes)
        mixed = None if axes is None else weighted(value, a, b, node)
        return None if mixed is None or axes is None else Located(mixed, axes)


class Add(_Elementwise):
    """Sums, biases, and zeros to begin with."""

    def both(self, a: Located, b: Located, node: ir.Node) -> Content | None:
        if isinstance(b.content, Stack):
            return with_chosen_bias(a, b.content)
        if isinstance(a.content, Uniform):
            return b.content if seeded(a, b) is not None else None
        return summed(a.content, b.content) or added(a.content, b.content)

    def constant(self, facts: Facts, a: Located, b: ir.Value, view: View, node: ir.Node) -> Content | None:
        return with_bias(a, view) or super().constant(facts, a, b, view, node)

    def number(self, a: Content, number: float, node: ir.Node) -> Content | None:
        return with_epsilon(a, number, node) or (None if as_features(a) is None else with_number("Add", a, number))


class Div(_Elementwise):
    """Quotients."""

    commutes = False

    def both(self, a: Located, b: Located, node: ir.Node) -> Content | None:
        return divided(a.content, b.content, node) if isinstance(b.content, Total) else None

    def number(self, a: Content, number: float, node: ir.Node) -> Content | None:
        return scaled(a, 1 / number, node.outputs[0]) or with_number("Div", a, number) if number else None


class Sub(_Elementwise):
    """Differences: of features and a number, of anything and zeros."""

    commutes = False

    def both(self, a: Located, b: Located, node: ir.Node) -> Content | None:
        return a.content if seeded(b, a) is not None else None


class Min(_Elementwise):
    """An upper bound."""


class Max(_Elementwise):
    """A lower bound."""

    def number(self, a: Content, number: float, node: ir.Node) -> Content | None:
        return bounded(a, number, node) or with_number("Max", a, number)


class Pow(_Elementwise):
    """Squares and cubes."""

    commutes = False

    def number(self, a: Content, number: float, node: ir.Node) -> Content | None:
        return power(a, number)


RECOGNISERS: tuple[Recogniser, ...] = (Mul(), Add(), Div(), Sub(), Min(), Max(), Pow())
