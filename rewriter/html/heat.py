"""Errors as heat maps: layer by expert for every role of experts, layer by role for all else."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from rewriter.report import Weight
from rewriter.report.coverage import BlockCoverage

LEVELS = 8
"""Colours of the scale."""

_WIDTH = 920
_LEFT = 34
_TOP = 18
_TITLED = 16_000
"""Cells above which none says its error on hovering: the file would exceed two megabytes."""

_NARROWEST = 0.25
"""Share of the largest error that a scale spans at least: smaller differences are noise, and should look like it."""

Place = tuple[int, int]

OUTPUTS, WEIGHTS = "output error", "error"
"""What heat maps of weights show."""


@dataclass(frozen=True)
class Scale:
    """Errors as colours.

    Attributes:
        low: the error of the first colour.
        high: of the last.
    """

    low: float
    high: float

    @classmethod
    def of(cls, errors: Iterable[float]) -> Scale:
        """Returns the scale from the smallest to the largest of the errors, or a wider one around them."""
        finite = [error for error in errors if math.isfinite(error)] or [0.0]
        low, high = min(finite), max(finite)
        missing = max(_NARROWEST * high - (high - low), 0)
        return cls(low - missing / 2, high + missing / 2)

    def level(self, error: float) -> int:
        """Returns the colour, from 0; what is not finite has the last."""
        if not math.isfinite(error):
            return LEVELS - 1
        span = self.high - self.low
        return min(int(LEVELS * (error - self.low) / span), LEVELS - 1) if span > 0 else 0


@dataclass(frozen=True)
class Cell:
    """One weight of a heat map.

    Attributes:
        x: where it is, in pixels.
        level: its colour.
        title: what it says on hovering; empty where there are too many to say it.
    """

    x: float
    level: int
    title: str


@dataclass(frozen=True)
class Row:
    """One layer.

    Attributes:
        y: where it is, in pixels.
        label: its index; empty where labels would touch.
        cells: its experts.
    """

    y: float
    label: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class HeatMap:
    """Layers by experts for one role.

    Attributes:
        role: what the weights are for.
        what: what the colours say of them.
        count: how many there are.
        scale: of the colours.
        size: width and height of a cell, in pixels.
        width: of the figure, in pixels.
        height: of the figure, in pixels.
        rows: the layers.
        ticks: place and index of the experts that are labelled.
    """

    role: str
    what: str
    count: int
    scale: Scale
    size: tuple[float, float]
    width: float
    height: float
    rows: tuple[Row, ...]
    ticks: tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class Grid:
    """Layers by roles, each cell with its error in words.

    Attributes:
        roles: the columns.
        what: what the colours say of the weights.
        scale: of the colours.
        rows: label, and for each role colour and error; None where there is no such weight.
    """

    roles: tuple[str, ...]
    what: str
    scale: Scale
    rows: tuple[tuple[str, tuple[tuple[int, float] | None, ...]], ...]


def heat_maps(weights: Sequence[Weight]) -> tuple[HeatMap, ...]:
    """Returns a heat map for each role whose weights are of experts, in order of their names.

    It shows the errors of their outputs, where a calibration tells what any of them saw; else of the weights.
    """
    roles: dict[str, list[Weight]] = defaultdict(list)
    for weight in weights:
        if weight.expert is not None:
            roles[weight.role].append(weight)
    found = {role: _cells(group, lambda weight: weight.expert or 0) for role, group in sorted(roles.items())}
    titled = sum(len(cells) for cells, _ in found.values()) <= _TITLED
    say = "{:.2%}".format if titled else None
    return tuple(heat_map(role, what, len(roles[role]), cells, say) for role, (cells, what) in found.items())


def _cells(weights: Sequence[Weight], column: Callable[[Weight], int]) -> tuple[dict[Place, float], str]:
    """Returns the worst error at each layer and column, and what errors they are."""
    outputs = any(weight.output_rms is not None for weight in weights)
    found: dict[Place, float] = {}
    for weight in weights:
        error = weight.output_rms if outputs else weight.relative_rms
        if error is not None:
            place = (-1 if weight.layer is None else weight.layer, column(weight))
            found[place] = max(found.get(place, error), error)
    return found, OUTPUTS if outputs else WEIGHTS


def coverage_map(blocks: Sequence[BlockCoverage]) -> HeatMap | None:
    """Returns the tokens that each expert saw, as powers of two; None where there are no experts."""
    cells: dict[Place, float] = {}
    for block in blocks:
        for expert, count in enumerate(block.counts):
            place = (-1 if block.layer is None else block.layer, expert)
            cells[place] = min(cells.get(place, math.inf), math.log2(1 + count))
    say = _tokens if len(cells) <= _TITLED else None
    return heat_map("tokens", "tokens", len(cells), cells, say) if cells else None


def _tokens(power: float) -> str:
    return f"{round(2**power - 1):,} tokens"


def grid(weights: Sequence[Weight]) -> Grid | None:
    """Returns the errors of weights that are in a layer and of no expert; None where there are none."""
    inside = [weight for weight in weights if weight.expert is None and weight.layer is not None]
    if not inside:
        return None
    roles = tuple(sorted({weight.role for weight in inside}))
    cells, what = _cells(inside, lambda weight: roles.index(weight.role))
    scale = Scale.of(cells.values())
    rows = []
    for layer in sorted({layer for layer, _ in cells}):
        errors = [cells.get((layer, column)) for column in range(len(roles))]
        rows.append((str(layer), tuple(None if e is None else (scale.level(e), e) for e in errors)))
    return Grid(roles, what, scale, tuple(rows))


def heat_map(
    role: str, what: str, count: int, cells: Mapping[Place, float], say: Callable[[float], str] | None
) -> HeatMap:
    """Lays a heat map out.

    Args:
        role: what it is about.
        what: what the colours say.
        count: how many things it shows.
        cells: by layer, -1 for none, and expert.
        say: what a cell says on hovering; None where none says anything.
    """
    layers = sorted({layer for layer, _ in cells})
    experts = 1 + max(expert for _, expert in cells)
    w = min(max((_WIDTH - _LEFT) / experts, 3), 30)
    h = min(max(420 / len(layers), 9), 18)
    every = max(1, math.ceil(10 / h))
    scale = Scale.of(cells.values())
    by_layer: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for (layer, expert), error in sorted(cells.items()):
        by_layer[layer].append((expert, error))
    rows = []
    for index, layer in enumerate(layers):
        where = "no layer" if layer < 0 else f"layer {layer}"
        row = [
            Cell(round(e * w, 1), scale.level(error), "" if say is None else f"{where}, expert {e}: {say(error)}")
            for e, error in by_layer[layer]
        ]
        label = ("-" if layer < 0 else str(layer)) if index % every == 0 else ""
        rows.append(Row(round(_TOP + index * h, 1), label, tuple(row)))
    step = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128, 1 << 30) if s * w >= 26)
    return HeatMap(
        role=role,
        what=what,
        count=count,
        scale=scale,
        size=(round(w - min(1, w / 6), 2), round(h - 1, 2)),
        width=round(_LEFT + experts * w, 1),
        height=round(_TOP + len(layers) * h, 1),
        rows=tuple(rows),
        ticks=tuple((round(e * w + w / 2, 1), str(e)) for e in range(0, experts, step)),
    )
