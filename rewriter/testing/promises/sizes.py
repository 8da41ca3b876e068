"""A constant that a rule only moves about is stored once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import onnx_ir as ir

from rewriter.graph.contents import stored_tensors
from rewriter.tensors import ContiguousCopy, StackedCopy, View


def check_sizes(before: ir.Model, after: ir.Model) -> None:
    """Holds views to what they are of: all parts of a constant must not hold more elements than the constant did.

    Elements, and not bytes: an exact Cast that goes with the constant copies nothing.

    Raises:
        AssertionError: a constant is copied, in part or whole, and stays.
    """
    had = Counter({id(slot.tensor): 0 for slot in stored_tensors(before)})
    has: Counter[int] = Counter()
    for slot in stored_tensors(before):
        had[id(slot.tensor)] += slot.tensor.size
    for view, slot in {View.whole(slot.tensor, ""): slot for slot in stored_tensors(after)}.items():
        for source, taken in parts(view, view.size):
            has[id(source)] += taken
            assert id(source) not in had or has[id(source)] <= had[id(source)], (
                f"{slot.label} is part of a constant whose parts hold {has[id(source)]} elements now, and it held"
                f" {had[id(source)]}"
            )


def parts(view: View, taken: int) -> Iterator[tuple[ir.TensorProtocol, int]]:
    """Yields the tensors that a view, or a copy of some, shows, with how many of the elements ``taken`` are of each."""
    source = view.source
    if not isinstance(source, ContiguousCopy | StackedCopy):
        yield source, taken
        return
    shown = (source.view,) if isinstance(source, ContiguousCopy) else source.sources
    for part in shown:
        yield from parts(part, taken // len(shown))
