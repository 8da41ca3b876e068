"""No weight stays in the model beside what a rewrite made of it."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

from rewriter.graph.contents import Slot, stored_tensors
from rewriter.operators.moe import MOE
from rewriter.quantize.job import PartTensor
from rewriter.tensors import View
from rewriter.testing.promises.agreement import jobs_of, read_in_float
from rewriter.testing.promises.sizes import parts

_SMALL = 1024
"""Bytes of a constant, and of those that a rule adds, that may be left: shapes, factors, biases."""
_GROUPS = ({"MatMul", "Gemm"}, {"Gather", "GatherND"}, {MOE.name})
"""Operators that read a weight alike, so that rules quantize it for each of them."""
_ALL = set().union(*_GROUPS)


def check_leftovers(before: ir.Model, after: ir.Model) -> None:
    """Holds a rule to what it does with the weights that it replaces: they go, or it declines.

    Raises:
        AssertionError: a quantized weight is still read in float, and not as where it is quantized, or a weight lost a
            reader and stays while the model holds more than it did.
    """
    _check_quantized(before, after)
    _check_computed(before, after)


def _check_quantized(before: ir.Model, after: ir.Model) -> None:
    had, has = _readers(before), _readers(after)
    for slot, weight in read_in_float(after, jobs_of(after)):
        readers, earlier = has[id(slot.tensor)], had.get(id(slot.tensor))
        # What another rule of the same run made of a weight was read by nothing before.
        lost = _ALL if earlier is None else set(earlier - readers)
        others = set(readers) - _alike(lost)
        assert not others, f"{slot.label} is left in the model, and its float weight '{weight}' is quantized too"


def _alike(lost: set[str]) -> set[str]:
    """Readers that a rule may leave to another one, or to another place of its own, where it has replaced these."""
    return set().union(*(group for group in _GROUPS if group & lost))


def _check_computed(before: ir.Model, after: ir.Model) -> None:
    had, has = _sizes(before), _sizes(after)
    shown = {tensor: _shown(slot) for slot in stored_tensors(after) if (tensor := id(slot.tensor)) not in had}
    codes = {
        id(slot.tensor) for slot in stored_tensors(after) if isinstance(slot.tensor, PartTensor) and slot.tensor.jobs
    }
    added = sum(has[new] for new, sources in shown.items() if not sources <= had.keys() and new not in codes)
    gone = sum(size for tensor, size in had.items() if tensor not in has.keys() | set().union(*shown.values()))
    if added - gone <= _SMALL:
        return
    readers = _readers(before), _readers(after)
    for slot in stored_tensors(after):
        tensor = id(slot.tensor)
        left = had.get(tensor, 0) > _SMALL and slot.tensor.dtype.is_floating_point()
        assert not left or readers[1][tensor].total() >= readers[0][tensor].total(), (
            f"{slot.label} lost a reader and is left in the model, beside {added} bytes of new constants"
        )


def _sizes(model: ir.Model) -> dict[int, int]:
    return {id(slot.tensor): slot.tensor.nbytes for slot in stored_tensors(model)}


def _shown(slot: Slot) -> set[int]:
    """The tensors of which this is a view or copy; itself where it is none."""
    return {id(source) for source, _ in parts(View.whole(slot.tensor, ""), 0)}


def _readers(model: ir.Model) -> dict[int, Counter[str]]:
    """Tensor -> operators that read it, and how often; empty for a graph output."""
    found: dict[int, Counter[str]] = {}
    for slot in stored_tensors(model):
        values = [slot.owner] if isinstance(slot.owner, ir.Value) else slot.owner.outputs
        counted = found.setdefault(id(slot.tensor), Counter())
        for value in values:
            counted.update(use.node.op_type for use in value.uses())
            counted.update([""] if value.is_graph_output() else [])
    return found
