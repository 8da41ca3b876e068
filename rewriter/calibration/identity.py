"""Names a weight by the stored tensor, and the expert in it, that it is a part of, however the graph was rewritten."""

from __future__ import annotations

import math
from typing import NamedTuple

from rewriter.tensors import RowsTensor, View


class Part(NamedTuple):
    """A matrix as the model stores it.

    Attributes:
        source: name of the initializer.
        expert: index of the matrix in a stack; None where the initializer is that matrix.
    """

    source: str
    expert: int | None


def stored_parts(weight: View, expert: int | None = None) -> tuple[Part, ...]:
    """Returns the stored matrices that a weight is made of: several where it joins or interleaves them.

    Args:
        weight: [N, K].
        expert: which expert it is, where the axes of the stored tensor do not tell.

    Returns:
        The parts in order. Empty where the input features are not a whole axis of what is stored, in its order: what
        such a weight sees cannot be told from what others see that show the rest.
    """
    return _parts(weight, weight.rank - 1, expert)


def _parts(view: View, features: int, expert: int | None) -> tuple[Part, ...]:
    """As ``stored_parts``, of a view whose axis ``features`` is that of the input features."""
    source = view.source
    outer = tuple(int(d) for d in source.shape.numpy())
    axis = _whole_axis(view, features, outer)
    if axis is None or not view.size or len(outer) < 2:
        return ()
    if isinstance(source, RowsTensor):
        found = []
        for shown in source.shown(*source.shown_rows(view)):
            inside = shown.rank + axis - len(outer)
            if inside < 0 or shown.shape[inside] != outer[axis]:
                return ()
            found.append(_parts(shown, inside, expert))
        return tuple(dict.fromkeys(part for parts in found for part in parts)) if all(found) else ()
    if len(outer) == 2:
        return (Part(view.name, None if view.size == source.size else expert),)
    inner = math.prod(outer[-2:])
    low, high = (position // inner for position in view.span)
    if view.size <= (high - low) * inner:  # an inner axis is that of the experts: each lies spread over all
        return (Part(view.name, expert),)
    return tuple(Part(view.name, index) for index in range(low, high + 1))


def _whole_axis(view: View, features: int, outer: tuple[int, ...]) -> int | None:
    """The axis of the source that the view's axis ``features`` shows all of, in order; None where there is none."""
    extent, stride = view.shape[features], view.strides[features]
    for axis, size in enumerate(outer):
        if size == extent and (extent == 1 or stride == math.prod(outer[axis + 1 :])):
            return axis
    return None
