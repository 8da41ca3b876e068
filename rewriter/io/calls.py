"""Calls of model-local functions: they end, and what they stand for is not larger than any runtime takes."""

from __future__ import annotations

from collections import Counter

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
    counts: dict[_Id, int] = {}
    open_: dict[_Id, None] = {}
    stack = list(called)
    while stack:
        current = stack[-1]
        if current in counts:
            stack.pop()
            continue
        open_[current] = None
        inner = [call for call in called[current] if call in called]
        waits = [call for call in inner if call not in counts]
        if any(call in open_ for call in waits):
            raise ModelError(f"function {current[0]}::{current[1]} calls itself; export the model without functions")
        if waits:
            stack.extend(dict.fromkeys(waits))
            continue
        counts[current] = len(called[current]) + sum(counts[call] for call in inner)
        del open_[current]
        stack.pop()
    return counts


def _calls(body: ir.Graph | ir.Function) -> list[_Id]:
    return [node.op_identifier() for node in ir.traversal.RecursiveGraphIterator(body)]
