"""One contrib operator: its slots, attributes, kernels by version, stored layouts and reference definition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

DOMAIN = "com.microsoft"

Plain = int | float | str
Version = tuple[int, int]
"""Major and minor version of ONNX Runtime."""


@dataclass(frozen=True)
class Operator:
    """A contrib operator of ONNX Runtime.

    Attributes:
        name: of the operator, in the domain com.microsoft.
        inputs: names that the schema gives to its slots, ``?`` behind one that may be left out.
        attributes: each with what its absence means; None where a node must have it, or absence says something else.
        gained: attributes that came later, and the first version of ONNX Runtime that does not refuse them.
        grown: (version, number of inputs), the newest first.
        quantized: whether it reads codes and scales.
    """

    name: str
    inputs: tuple[str, ...]
    attributes: Mapping[str, Plain | None]
    gained: Mapping[str, Version] = field(default_factory=dict)
    grown: tuple[tuple[Version, int], ...] = ()
    quantized: bool = False

    def computes(self, node: ir.Node) -> bool:
        return node.domain == DOMAIN and node.op_type == self.name

    def input_count(self, version: Version) -> int:
        """Returns how many inputs the operator of a version of ONNX Runtime has at most."""
        return next((count for since, count in self.grown if since <= version), len(self.inputs))


@dataclass(frozen=True)
class Slots:
    """Input slots of one projection of the experts: fc1, fc2 or fc3.

    Attributes:
        name: fc1, fc2 or fc3.
        weight: float weights, or codes.
        bias: [E, N].
        scales: of codes.
        zero_points: of codes.
        global_scale: [E] factors of the scales of floating-point codes.
    """

    name: str
    weight: int
    bias: int
    scales: int | None = None
    zero_points: int | None = None
    global_scale: int | None = None

    def parts(self, *, global_scale: bool = False) -> tuple[int, ...]:
        """Returns the slots of what a quantized weight is stored as, in the order in which layouts have it.

        Args:
            global_scale: whether the last is a global scale, and not zero points.
        """
        last = self.global_scale if global_scale else self.zero_points
        return tuple(slot for slot in (self.weight, self.scales, last) if slot is not None)

    @property
    def stacks(self) -> tuple[int, ...]:
        """Slots of what has an axis of experts."""
        found = (self.weight, self.bias, self.scales, self.zero_points, self.global_scale)
        return tuple(slot for slot in found if slot is not None)


@dataclass(frozen=True)
class ExpertsOperator(Operator):
    """An operator that runs a mixture of experts.

    Attributes:
        projections: slots of fc1, fc2 and fc3.
    """

    projections: tuple[Slots, ...] = ()


def input_at(node: ir.Node, slot: int | None) -> ir.Value | None:
    """Returns an optional input; None where it is left out, empty, or a constant without elements."""
    value = node.inputs[slot] if slot is not None and slot < len(node.inputs) else None
    if value is not None and value.const_value is not None and not value.const_value.size:
        return None
    return value
