"""Elementwise operators on located contents: each asks the laws of every family in turn.

Facts stated: ``Located``, ``Integers``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import onnx_ir as ir

from rewriter.facts import Facts, Family
from rewriter.facts.integers import integers_of
from rewriter.facts.size import Integers, arithmetic
from rewriter.rules.blocks.activations import number_of
from rewriter.rules.blocks.axes import Content, Located, Uniform, unify
from rewriter.rules.blocks.laws import of_any, of_constant, of_number, of_two
from rewriter.tensors import View

elementwise = Family("elementwise")
_T = TypeVar("_T")
_Operand = tuple[ir.Value, Located | None]
_COMMUTE = ("Mul", "Add", "Min", "Max")


@elementwise.at("Mul", "Add", "Div", "Sub", "Min", "Max", "Pow")
def operator(facts: Facts, node: ir.Node, a: ir.Value, b: ir.Value) -> Located | Integers | None:
    """``Op(a, b)``, in the order that a law has where the operator commutes."""
    sized = [facts.get(value, Integers) is not None for value in (a, b)]
    if any(sized):
        located = facts.get(b if sized[0] else a, Located)
        if located is None or isinstance(located.content, Uniform):
            return arithmetic(node.op_type, integers_of(facts, a), integers_of(facts, b))
    first, second = (a, facts.get(a, Located)), (b, facts.get(b, Located))
    found = _ordered(facts, first, second, node)
    return _ordered(facts, second, first, node) if found is None and node.op_type in _COMMUTE else found


@elementwise.at("Concat", "Max", "Min", "Sum", "Mean")
def alone(facts: Facts, node: ir.Node, x: ir.Value) -> Located | None:
    """An operator of any number of operands, of one: nothing."""
    return facts.get(x, Located)


def _ordered(facts: Facts, left: _Operand, right: _Operand, node: ir.Node) -> Located | None:
    (a, first), (b, second) = left, right
    if first is not None and second is not None:
        both = _of_both(node.op_type, first, second, node)
        if both is not None:
            return both
    view = facts.get(b, View)
    if first is not None and view is not None:
        held = _first(of_constant.of(node.op_type), first, view, node)
        if held is None and view.rank <= first.rank:
            held = _with_number(first, number_of(facts, b), node)
        return None if held is None else Located(held, first.axes)
    size = facts.get(b, Integers)
    if first is not None and size is not None and len(size.sizes) == 1:
        held = _with_number(first, size.sizes[0].constant, node)
        return None if held is None else Located(held, first.axes)
    if facts.get(a, View) is not None or second is None:
        return None
    return _of_any(facts, node.op_type, left, second, node)


def masked(facts: Facts, value: ir.Value, mask: Located, node: ir.Node) -> Located | None:
    """Returns what a value of which something is known is times a mask, whichever operator multiplies it."""
    held = facts.get(value, Located)
    return None if held is None else product(facts, (value, held), mask, node)


def product(facts: Facts, a: tuple[ir.Value, Located], b: Located, node: ir.Node) -> Located | None:
    """Returns what a value, with what is known of it, is times a content, whichever operator multiplies them."""
    return _of_both("Mul", a[1], b, node) or _of_any(facts, "Mul", a, b, node)


def _of_both(op_type: str, a: Located, b: Located, node: ir.Node) -> Located | None:
    axes = unify(a.axes, b.axes)
    both = None if axes is None else _first(of_two.of(op_type), a, b, node)
    return None if both is None or axes is None else Located(both, axes)


def _of_any(facts: Facts, op_type: str, a: _Operand, b: Located, node: ir.Node) -> Located | None:
    return _first(of_any.of(op_type), facts, *a, b, node)


def _with_number(a: Located, number: float | None, node: ir.Node) -> Content | None:
    return None if number is None else _first(of_number.of(node.op_type), a, number, node)


def _first(laws: Sequence[Callable[..., _T | None]], *about: object) -> _T | None:
    """What the first law says that is about these."""
    for law in laws:
        found = law(*about)
        if found is not None:
            return found
    return None
