"""What a weight is called: by the constants of the model that it shows, and by which part of each."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from rewriter.tensors.view import View

_SEPARATOR = re.compile(r"[._/:]")


def weight_name(view: View) -> str:
    """Returns a name that tells the view from every other part of the model's constants.

    ``w`` for all of a constant, however it is turned; ``w__slice_3`` for one matrix of a stack;
    ``w__rows_0_63`` for some rows (both ends included); ``{gate,up}.weight`` for two constants in one.
    """
    return names_of(view)[0]


def names_of(view: View) -> tuple[str, tuple[str, ...]]:
    """Returns the name of a view, and those of the constants that it shows a part of."""
    boxes: dict[str, tuple[tuple[int, ...], list[int], list[int]]] = {}
    for leaf in view.leaves:
        shape = tuple(leaf.source.shape.numpy())
        if leaf.size == math.prod(shape):
            low, high = [0] * len(shape), [extent - 1 for extent in shape]
        else:
            low, high = (_position(at, shape) for at in leaf.span)
        if leaf.name in boxes:
            _, lowest, highest = boxes[leaf.name]
            low, high = list(map(min, low, lowest)), list(map(max, high, highest))
        boxes[leaf.name] = (shape, low, high)
    return braced([name + _part(*box) for name, box in boxes.items()]), tuple(boxes)


def braced(names: Sequence[str]) -> str:
    """Returns several names as one, as a shell would read it: ``layers.0.{gate,up}.weight``."""
    if len(names) == 1:
        return names[0]
    begin = _cut_back(common_prefix(names))
    rest = [name[len(begin) :] for name in names]
    end = _cut_back(common_prefix([name[::-1] for name in rest]))[::-1]
    return f"{begin}{{{','.join(name.removesuffix(end) for name in rest)}}}{end}"


def common_prefix(names: Sequence[str]) -> str:
    """Returns what all begin with, letter by letter."""
    first, last = min(names), max(names)
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def _cut_back(common: str) -> str:
    """Up to its last separator, which it keeps: names differ by words, not by letters."""
    ends = [found.end() for found in _SEPARATOR.finditer(common)]
    return common[: ends[-1]] if ends else ""


def _position(at: int, shape: tuple[int, ...]) -> list[int]:
    found: list[int] = []
    for extent in reversed(shape):
        at, index = divmod(at, extent or 1)
        found.append(index)
    return found[::-1]


def _part(shape: tuple[int, ...], low: Sequence[int], high: Sequence[int]) -> str:
    found = ""
    for axis, (extent, first, last) in enumerate(zip(shape, low, high, strict=True), -len(shape)):
        if (first, last) != (0, extent - 1):
            kind = {-1: "columns", -2: "rows"}.get(axis, "slice")
            found += f"__{kind}_{first}" if kind == "slice" and first == last else f"__{kind}_{first}_{last}"
    return found
