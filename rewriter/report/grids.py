"""Weights that were trained in few bits: which are kept as they were, and what kept the others from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from rewriter.report.records import Weight
from rewriter.text import names

KEPT = "kept as it was trained"
"""What ``Weight.grid`` says of a weight that lies on a grid and is written as that."""


def on_grids(weights: Iterable[Weight]) -> tuple[str, ...]:
    """Returns a line for each form in which weights are kept, and for each block that kept weights from their grid."""
    kept: dict[str, Counter[str]] = {}
    left: dict[str, list[Weight]] = {}
    for weight in weights:
        if weight.grid == KEPT:
            kept.setdefault(_form(weight), Counter())[weight.role or "of no role"] += 1
        elif weight.grid:
            left.setdefault(weight.grid, []).append(weight)
    lines = [
        f"kept as trained, {form}: {names([f'{count:,} {role}' for role, count in sorted(roles.items())])}"
        for form, roles in sorted(kept.items())
    ]
    for why, those in left.items():
        first = those[0]
        whom = f"'{first.name}'" if len(those) == 1 else f"{len(those):,} weights that are held together"
        lines.append(f"{why}; {first.algorithm} took {whom} in {_form(first)}")
    return tuple(lines)


def _form(weight: Weight) -> str:
    if weight.format != "int":
        return weight.format
    block = f"blocks of {weight.block_size}" if weight.block_size else "one scale per output"
    return f"{weight.bits} bits, {block}{'' if weight.symmetric else ', zero points'}"
