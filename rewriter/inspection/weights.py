"""Which role each stored tensor serves, and how many bytes each family of roles takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import onnx_ir as ir

from rewriter.report import Size
from rewriter.roles import Role
from rewriter.stored import Slot, stored_tensors

MOVES = frozenset(
    {
        "Cast", "DequantizeLinear", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Reshape",
        "SequenceAt", "Slice", "Split", "SplitToSequence", "Squeeze", "Transpose", "Unsqueeze",
    }
)  # fmt: skip
"""Operators that only move elements: what happens to a weight may happen behind them."""

RoleOf = Callable[[ir.Node], Role]

_NONE = Role()
_ENOUGH = 64
"""Nodes behind a tensor that are asked for their role."""


def with_roles(model: ir.Model, role_of: RoleOf) -> Iterator[tuple[Slot, Role]]:
    """Yields every stored tensor with the role of the first node that reads it and has one.

    Args:
        model: the model.
        role_of: the role of a node; an unnamed role where it has none.
    """
    for slot in stored_tensors(model):
        yield slot, _role(slot, role_of)


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


def _role(slot: Slot, role_of: RoleOf) -> Role:
    if isinstance(slot.owner, ir.Node):
        if slot.owner.op_type != "Constant":
            return role_of(slot.owner)
        pending = [slot.owner.outputs[0]]
    else:
        pending = [slot.owner]
    asked = 0
    while pending and asked < _ENOUGH:
        for use in pending.pop().uses():
            asked += 1
            role = role_of(use.node)
            if role.name:
                return role
            if use.node.op_type in MOVES and use.idx == 0:
                pending.extend(use.node.outputs)
            if asked >= _ENOUGH:
                break
    return _NONE
