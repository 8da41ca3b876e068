"""Integers that no input can change, or that follow from shapes: what operands of movement operators are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import onnx_ir as ir

from rewriter.facts.facts import Facts
from rewriter.facts.size import Dims, Integers, Size
from rewriter.graph.attributes import integers_attribute
from rewriter.tensors import View

_SMALL = 4096
"""Elements of the largest constant that is read as an operand."""


class Shaped(ABC):
    """A fact that also tells the extents of its value, and its elements where these are known integers."""

    @property
    @abstractmethod
    def dims(self) -> Dims:
        """The extents."""

    @property
    def integers(self) -> Integers | None:
        """The elements, where they are integers that are known."""
        return None


def shaped(facts: Facts, value: ir.Value) -> Shaped | None:
    """Returns what is known of a value by a fact that tells its extents, or None."""
    return next((fact for fact in facts.of(value) if isinstance(fact, Shaped)), None)


def integers_of(facts: Facts, value: ir.Value | None) -> Integers | None:
    """Returns the integers that ``value`` holds, constant or computed from shapes."""
    if value is None:
        return None
    known = facts.get(value, Integers)
    if known is not None:
        return known
    told = shaped(facts, value)
    if told is not None and told.integers is not None:
        return told.integers
    view = facts.get(value, View)
    return (
        None if view is None or not _is_operand(view) else Integers(tuple(map(Size.of, view.integers)), view.rank == 0)
    )


def _is_operand(view: View) -> bool:
    return view.rank <= 1 and view.size <= _SMALL and view.dtype.is_integer()


def static(
    facts: Facts, node: ir.Node, position: int, attribute: str = "", default: Sequence[int] | None = None
) -> list[int] | None:
    """Returns an integer operand that no input can change; None where one can, or where it is absent with no default.

    Args:
        facts: what is known.
        node: the operator.
        position: of the input.
        attribute: what the operand is in older opsets.
        default: what it is where it is absent.
    """
    if attribute and attribute in node.attributes.data:
        return integers_attribute(node, attribute, ())
    inputs = node.inputs
    given = inputs[position] if position < len(inputs) else None
    if given is None:
        return None if default is None else list(default)
    view = facts.get(given, View)
    if view is not None and _is_operand(view):
        return list(view.integers)
    known = integers_of(facts, given)
    values = [size.constant for size in known.sizes] if known is not None else [None]
    return None if None in values else [v for v in values if v is not None]
