"""Guards: each returns what it has proved, or declines with the reason and the value at fault."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from rewriter.facts import Facts
from rewriter.graph.declines import CONSTANT, INFER_SHAPES, INLINE, ONE_FLOAT_TYPE
from rewriter.rule import Declined
from rewriter.tensors import View

FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_SMALL = 4096


def integer_attribute(node: ir.Node, name: str, default: int) -> int:
    """Returns an INT attribute, or its default where the node omits it."""
    attribute = _attribute(node, name)
    return default if attribute is None else attribute.as_int()


def float_attribute(node: ir.Node, name: str, default: float) -> float:
    """Returns a FLOAT attribute, or its default where the node omits it."""
    attribute = _attribute(node, name)
    return default if attribute is None else attribute.as_float()


def integers_attribute(node: ir.Node, name: str, default: Sequence[int]) -> list[int]:
    """Returns an INTS attribute, or its default where the node omits it."""
    attribute = _attribute(node, name)
    return list(default) if attribute is None else list(attribute.as_ints())


def text_attribute(node: ir.Node, name: str, default: str) -> str:
    """Returns a STRING attribute, or its default where the node omits it."""
    attribute = _attribute(node, name)
    return default if attribute is None else attribute.as_string()


def cast_type(node: ir.Node) -> ir.DataType | None:
    """Returns what a Cast casts to, or None where its number is no element type."""
    number = integer_attribute(node, "to", 0)
    known = {dtype.value for dtype in ir.DataType} - {ir.DataType.UNDEFINED.value}
    return ir.DataType(number) if number in known else None


def _attribute(node: ir.Node, name: str) -> ir.Attr | None:
    """Returns the attribute, or declines: a function's caller sets it."""
    attribute = node.attributes.get(name)
    if attribute is not None and attribute.is_ref():
        raise Declined(f"{name} is set by the caller of a function", node, remedy=INLINE)
    return attribute


def integers(
    facts: Facts, node: ir.Node, position: int, attribute: str, default: Sequence[int] | None = None
) -> list[int] | None:
    """Returns a small constant integer operand, given as an input or (older opsets) as an attribute.

    None where it depends on an input, or is absent and has no default.
    """
    if attribute and attribute in node.attributes:
        return integers_attribute(node, attribute, ())
    if position >= len(node.inputs) or node.inputs[position] is None:
        return None if default is None else list(default)
    view = facts.get(node.inputs[position], View)
    if view is None or view.dtype.is_floating_point() or view.size > _SMALL:
        return None
    return [int(i) for i in view.numpy().reshape(-1).tolist()]


def require_constant(facts: Facts, value: ir.Value, what: str) -> View:
    """Returns the view that ``value`` is, or declines: it is not constant."""
    view = facts.get(value, View)
    if view is None:
        why = facts.why_not(value)
        raise Declined(f"{what} is not constant{f': {why}' if why else ''}", value, remedy=why.remedy or CONSTANT)
    return view


def require_dtype(value: ir.Value, allowed: frozenset[ir.DataType], what: str) -> ir.DataType:
    """Returns the element type of ``value``, or declines: it is unknown or not among ``allowed``."""
    if value.dtype is None:
        raise Declined(f"the element type of {what} is unknown", value, remedy=INFER_SHAPES)
    if value.dtype not in allowed:
        names = ", ".join(sorted(d.name for d in allowed))
        raise Declined(f"{what} is {value.dtype.name}; the operator takes {names}", value, remedy=ONE_FLOAT_TYPE)
    return value.dtype
