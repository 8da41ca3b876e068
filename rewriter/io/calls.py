"""Calls of model-local functions: refuses recursion, and models that no runtime takes once all calls are inlined."""

from __future__ import annotations

from collections import Counter
from graphlib import CycleError, TopologicalSorter

import onnx_ir as ir

from rewriter.errors import ModelError

MOST_NODES = 2_000_000
"""Of a model with its functions inlined, as runtimes do when they load it."""

_Id = tuple[str, str, str]


def require_bounded_calls(model: ir.Model) -> None:
    """Counts the nodes that a model has with its functions inlined.

    Raises:
        ModelError: a function calls itself, by way of others or not, or there are more nodes than any runtime takes.
    """
    if not model.functions:
        return
    called = {identity: _calls(function) for identity, function in model.functions.items()}
    counts = _counts(called)
    total = sum(counts.get(call, 1) for call in _calls(model.graph))
    if total > MOST_NODES:
        raise ModelError(
            f"with its functions inlined, as runtimes do, the model has {total:,} nodes; {MOST_NODES:,} are the most"
            " that are read: export it without functions that call one another so often"
        )


def instances(model: ir.Model) -> Counter[_Id]:
    """Returns how often each function is computed in a run of the model, however deep the calls are.

    Raises:
        ModelError: a function calls itself, by way of others or not.
    """
    called = {identity: _calls(function) for identity, function in model.functions.items()}
    found = Counter(call for call in _calls(model.graph) if call in called)
    for caller in reversed(_counts(called)):  # callers before those that they call
        for call in called[caller]:
            if call in called:
                found[call] += found[caller]
    return found


def _counts(called: dict[_Id, list[_Id]]) -> dict[_Id, int]:
    """Function -> nodes with all calls inlined; a function stands behind those that it calls."""
    calls = {identity: [call for call in inner if call in called] for identity, inner in called.items()}
    counts: dict[_Id, int] = {}
    try:
        for identity in TopologicalSorter(calls).static_order():
            counts[identity] = len(called[identity]) + sum(counts[call] for call in calls[identity])
    except CycleError as error:
        domain, name, *_ = error.args[1][0]
        raise ModelError(f"function {domain}::{name} calls itself; export the model without functions") from error
    return counts


def _calls(body: ir.Graph | ir.Function) -> list[_Id]:
    return [node.op_identifier() for node in ir.traversal.RecursiveGraphIterator(body)]
