"""Which role each stored tensor serves, and how many bytes each family of roles takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

import onnx_ir as ir

from rewriter.facts.moves import OPERATORS
from rewriter.graph.contents import Slot, stored_tensors
from rewriter.graph.walk import producers, walk
from rewriter.report import Size
from rewriter.roles import Role
from rewriter.tensors import constant

MOVES = frozenset({*OPERATORS, "Cast", "DequantizeLinear", "GatherElements", "SequenceAt"})
"""Operators that only move elements: what happens to a weight may happen behind them."""

RoleOf = Callable[[ir.Node], Role]

_NONE = Role()


def with_roles(model: ir.Model, role_of: RoleOf) -> Iterator[tuple[Slot, Role]]:
    """Yields every stored tensor with the role of the first node that reads it and has one.

    Args:
        model: the model.
        role_of: the role of a node; an unnamed role where it has none.
    """
    for slot in stored_tensors(model):
        yield slot, role_of_tensor(slot, role_of)


def family(role: Role | str) -> str:
    """Returns the first part of a role's name: ``expert`` of ``expert.gate_up``."""
    return (role if isinstance(role, str) else role.name).partition(".")[0]


def bytes_by_family(model: ir.Model, role_of: RoleOf) -> Mapping[str, int]:
    """Returns family of roles -> bytes of its tensors; they add up to all bytes of the model."""
    found: Counter[str] = Counter()
    for slot, role in with_roles(model, role_of):
        found[family(role)] += slot.tensor.nbytes
    return found


def sizes(before: Mapping[str, int], after: Mapping[str, int]) -> tuple[Size, ...]:
    """Returns both side by side, the largest family first."""
    families = before.keys() | after.keys()
    found = [Size(name, before.get(name, 0), after.get(name, 0)) for name in families]
    return tuple(sorted(found, key=lambda size: (-size.bytes_before, -size.bytes_after, size.family)))


def readers(slot: Slot) -> Iterator[ir.Node]:
    """Yields the nodes that read a tensor, and those behind them that read what they only move."""
    if isinstance(slot.owner, ir.Node) and slot.owner.op_type != "Constant":
        yield slot.owner
        return
    whole = slot.owner.outputs[0] if isinstance(slot.owner, ir.Node) else slot.owner
    uses: Iterable[tuple[ir.Node, int]] = whole.uses()
    for node, _ in walk(uses, _moved_uses, limit=None):
        yield node


def _moved_uses(use: tuple[ir.Node, int]) -> list[tuple[ir.Node, int]]:
    """The readers of a use's output, where the use only moves the tensor."""
    node, position = use
    moves = position == 0 and node.op_type in MOVES
    return [behind for value in node.outputs for behind in value.uses()] if moves else []


def operators(slot: Slot) -> tuple[str, ...]:
    """Returns the operators that read a tensor or what only constants make of it: none beyond a lookup by an input."""
    found: dict[str, None] = {}
    moved = {slot.owner.outputs[0] if isinstance(slot.owner, ir.Node) else slot.owner}
    for node in readers(slot):
        if moved.isdisjoint(node.inputs) and node is not slot.owner:
            continue
        found[node.op_type] = None
        if node.op_type in MOVES and all(value in moved or _is_fixed(value) for value in node.inputs):
            moved |= set(node.outputs)
    return tuple(found)


def _is_fixed(value: ir.Value | None) -> bool:
    """Whether nothing but constants makes a value, as an index or a shape."""
    if value is None:
        return True
    before = walk([value], producers, limit=None)
    return all(constant(at) is not None for at in before if not producers(at))


def role_of_tensor(slot: Slot, role_of: RoleOf) -> Role:
    """Returns the role of the first node that reads a tensor and has one; a tied table is an embedding."""
    found = _NONE
    for node in readers(slot):
        role = role_of(node)
        if role.name == "embedding":
            return role
        found = found if found.name else role
    return found
