"""One bounded walk over whatever hangs together: readers behind a value, producers before it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TypeVar

import onnx_ir as ir

from rewriter.graph.declines import Declined

T = TypeVar("T", bound=Hashable)

FAR = 4096
"""How many places are looked at where a walk is bounded, and no number is given."""


class GaveUp(Declined):
    """A walk ended at its bound, with places left to look at."""


def walk(start: Iterable[T], step: Callable[[T], Iterable[T]], *, limit: int | None = FAR) -> Iterator[T]:
    """Yields what can be reached from ``start``, nearest first, each place once; so that it ends without a bound too.

    Args:
        start: where to begin; yielded too.
        step: the places next to one; asked after that one was yielded.
        limit: how many places are yielded at most; None for all of them.

    Raises:
        GaveUp: there are more than ``limit``.
    """
    pending: deque[T] = deque(dict.fromkeys(start))
    seen: set[T] = set(pending)
    count = 0
    while pending:
        place = pending.popleft()
        if count == limit:
            culprit = place if isinstance(place, ir.Node | ir.Value) else None
            raise GaveUp(
                f"gave up after {limit:,} places of the graph: what follows is too large to be looked at", culprit
            )
        count += 1
        yield place
        for other in step(place):
            if other not in seen:
                seen.add(other)
                pending.append(other)


def producers(value: ir.Value | None) -> list[ir.Value]:
    """Returns the values that the node which makes ``value`` reads, as a step of a walk towards inputs."""
    node = None if value is None else value.producer()
    return [] if node is None else [given for given in node.inputs if given is not None]


def readers(value: ir.Value) -> list[ir.Node]:
    """Returns the nodes that read ``value``, in the order in which they do, each once."""
    return list(dict.fromkeys(use.node for use in value.uses()))
