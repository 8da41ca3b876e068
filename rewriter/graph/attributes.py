"""Attributes of a node: a reader returns the value or its default, and declines where a function's caller sets it."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from rewriter.graph.declines import INLINE, Declined


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


_TYPES = {dtype.value: dtype for dtype in ir.DataType if dtype != ir.DataType.UNDEFINED}


def cast_type(node: ir.Node) -> ir.DataType | None:
    """Returns what a Cast casts to, or None where its number is no element type."""
    number = integer_attribute(node, "to", 0)
    return _TYPES.get(number)


def _attribute(node: ir.Node, name: str) -> ir.Attr | None:
    """Returns the attribute, or declines: a function's caller sets it."""
    attribute = node.attributes.data.get(name)
    if attribute is not None and attribute.is_ref():
        raise Declined(f"{name} is set by the caller of a function", node, remedy=INLINE)
    return attribute
