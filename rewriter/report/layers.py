"""Output errors of quantized weights, summed up by layer: where a model loses the most."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rewriter.report.records import Weight


@dataclass(frozen=True)
class LayerError:
    """The quantized weights of one role in one layer.

    Attributes:
        layer: its index; None for what belongs to no layer.
        role: what they are for; empty where the structure does not tell.
        count: how many there are whose output error is known.
        mean: of their output errors.
        largest: of them.
        worst: the weight that has it.
    """

    layer: int | None
    role: str
    count: int
    mean: float
    largest: float
    worst: Weight


def by_layer(weights: Iterable[Weight]) -> tuple[LayerError, ...]:
    """Sums the output errors of weights up by layer and role, the largest mean first."""
    groups: dict[tuple[int | None, str], list[tuple[float, Weight]]] = {}
    for weight in weights:
        if weight.output_rms is not None:
            groups.setdefault((weight.layer, weight.role), []).append((weight.output_rms, weight))
    found = [
        LayerError(
            layer,
            role,
            len(group),
            sum(error for error, _ in group) / len(group),
            *max(group, key=lambda entry: entry[0]),
        )
        for (layer, role), group in groups.items()
    ]
    return tuple(sorted(found, key=lambda e: (-e.mean, -1 if e.layer is None else e.layer, e.role)))
