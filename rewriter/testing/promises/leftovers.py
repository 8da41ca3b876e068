"""Whether a weight is left in the model beside what a rewrite made of it, so that the model grows."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

from rewriter.stored import Slot, stored_tensors
from rewriter.tensors import View
from rewriter.testing.promises.agreement import jobs_of, positions
from rewriter.testing.promises.sizes import parts

_SMALL = 1024
"""Bytes of a constant, and of those that a rule adds, that may be left: shapes, factors, biases."""


def check_leftovers(before: ir.Model, after: ir.Model) -> None:
    """Holds a rule to what it does with the weights that it replaces: they go, or it declines.

    Raises:
        AssertionError: a quantized weight is still read in float, or a weight lost a reader and stays while the model
            holds more than it did.
    """
    _check_quantized(after)
    _check_computed(before, after)


def _check_quantized(after: ir.Model) -> None:
    quantized: dict[int, dict[int, str]] = {}
    for job in jobs_of(after):
        source, places = positions(job.weight)
        quantized.setdefault(id(source), {}).update(dict.fromkeys(places.reshape(-1).tolist(), job.context.weight))
    for slot in stored_tensors(after):
        source, places = positions(View.whole(slot.tensor, ""))
        known = quantized.get(id(source), {})
        both = next((known[place] for place in places.reshape(-1).tolist() if place in known), None)
        assert both is None, f"{slot.label} is left in the model, and its float weight '{both}' is quantized too"


def _check_computed(before: ir.Model, after: ir.Model) -> None:
    had, has = _sizes(before), _sizes(after)
    shown = {tensor: _shown(slot) for slot in stored_tensors(after) if (tensor := id(slot.tensor)) not in had}
    added = sum(has[tensor] for tensor, sources in shown.items() if not sources <= had.keys())
    gone = sum(size for tensor, size in had.items() if tensor not in has.keys() | set().union(*shown.values()))
    if added - gone <= _SMALL:
        return
    readers = _readers(before), _readers(after)
    for slot in stored_tensors(after):
        tensor = id(slot.tensor)
        left = had.get(tensor, 0) > _SMALL and slot.tensor.dtype.is_floating_point()
        assert not left or readers[1][tensor] >= readers[0][tensor], (
            f"{slot.label} lost a reader and is left in the model, beside {added} bytes of new constants"
        )


def _sizes(model: ir.Model) -> dict[int, int]:
    return {id(slot.tensor): slot.tensor.nbytes for slot in stored_tensors(model)}


def _shown(slot: Slot) -> set[int]:
    """The tensors of which this is a view or copy; itself where it is none."""
    return {id(source) for source, _ in parts(View.whole(slot.tensor, ""), 0)}


def _readers(model: ir.Model) -> Counter[int]:
    """How many nodes, and graph outputs, read each tensor."""
    found: Counter[int] = Counter()
    for slot in stored_tensors(model):
        found[id(slot.tensor)] += sum(len(value.uses()) + value.is_graph_output() for value in _values(slot))
    return found


def _values(slot: Slot) -> tuple[ir.Value, ...]:
    return (slot.owner,) if isinstance(slot.owner, ir.Value) else tuple(slot.owner.outputs)
