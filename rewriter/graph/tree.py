"""Patterns that are trees of operators and variables, and whether a node and its producers match one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir


@dataclass(frozen=True, eq=False, slots=True)
class Part:
    """One node of a pattern.

    Attributes:
        pattern: onnxscript's own.
        domain: of the operator.
        operator: its type.
        attributes: whether a node has those that are asked for, and binds them; None where none is.
        inputs: what it reads; None where it must read nothing.
        outputs: the names of its outputs, None for one that has none.
        takes_more: whether a node may have more inputs.
    """

    pattern: Any
    domain: str
    operator: str
    attributes: Callable[[ir.Node, Any], object] | None
    inputs: tuple[Read | None, ...]
    outputs: tuple[str | None, ...]
    takes_more: bool


Read = tuple[str | None, bool, Part | None, int]
"""The name of what a part reads, whether it may be missing, the part that makes it, and at which of its outputs."""


def binds(part: Part, node: ir.Node, names: dict[str, Any], bound: dict[Part, ir.Node], found: Any) -> bool:
    """Whether a node, and what it reads, is what a part of a tree asks for; binds them as onnxscript does.

    Args:
        part: of the pattern.
        node: of the model.
        names: name -> what is bound to it; added to.
        bound: part -> what is bound to it; added to.
        found: onnxscript's result, which binds attributes.
    """
    if part in bound:
        return bound[part] is node
    wanted, given = part.inputs, node.inputs
    if node.op_type != part.operator or node.domain != part.domain:
        return False
    if part.attributes is not None and not part.attributes(node, found):
        return False
    if len(given) > len(wanted) and not part.takes_more:
        return False
    if len(given) < len(wanted):
        given = (*given, *[None] * (len(wanted) - len(given)))
    bound[part] = node
    for asked, value in zip(wanted, given, strict=False):
        if asked is None:
            if value is not None:
                return False
            continue
        name, may_be_missing, producer, index = asked
        if value is None and not may_be_missing:
            return False
        if name is not None and names.setdefault(name, value) is not value:
            return False
        if producer is None:
            continue
        if value is None or (made := value.producer()) is None:
            return False
        if made.graph is not node.graph or value.index() != index or not binds(producer, made, names, bound, found):
            return False
    outputs = node.outputs
    if len(part.outputs) > len(outputs):
        return False
    for name, value in zip(part.outputs, outputs, strict=False):
        if name is not None and names.setdefault(name, value) is not value:
            return False
    return True


def only_these_read(nodes: Collection[ir.Node], outputs: Sequence[ir.Value]) -> bool:
    """Whether nothing but these nodes reads what they make, apart from some outputs."""
    for node in nodes:
        for value in node.outputs:
            if value in outputs:
                continue
            if value.is_graph_output() or any(use.node not in nodes for use in value.uses()):
                return False
    return True
