"""What of a run concerns one node or one weight."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from rewriter.api import Result
from rewriter.cli.forecast import planned
from rewriter.errors import UsageError
from rewriter.report import Application, Decline, Weight
from rewriter.roles import find_roles

_MOVES = frozenset(
    {
        "Cast", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Reshape", "SequenceAt",
        "Slice", "Split", "SplitToSequence", "Squeeze", "Transpose", "Unsqueeze",
    }
)  # fmt: skip
"""Operators that only move elements: what happens to a weight may happen behind them."""


@dataclass(frozen=True)
class Concern:
    """A node or weight, and what a run did about it.

    Attributes:
        name: its name.
        what: kind, type, role and what becomes of it, in one line.
        applications: rewrites at it, or at what reads it.
        declines: likewise.
    """

    name: str
    what: str
    applications: tuple[Application, ...]
    declines: tuple[Decline, ...]


def concern(name: str, original: ir.Model, result: Result[Any]) -> Concern:
    """Finds what concerns a node, a value it computes, a weight, or a weight of the rewritten model.

    Raises:
        UsageError: nothing has this name; the message holds the nearest name.
    """
    nodes = {n.name: n for n in _nodes(original) if n.name}
    values = {v.name: n for n in _nodes(original) for v in n.outputs if v.name}
    tensors = {key: value for graph in original.graphs() for key, value in graph.initializers.items()}
    weights = {weight.name: weight for weight in planned(result.ir_model)}
    if name in nodes or name in values:
        node = nodes.get(name) or values[name]
        return _concern(name, ", ".join(filter(None, (f"node, {node.op_type}", _role(original, node)))), [node], result)
    if name in tensors:
        tensor = tensors[name].const_value
        kind = "weight" if tensor is None else f"weight, {tensor.dtype.name}{list(tensor.shape.numpy())}"
        fate = _spec(weights[name]) if name in weights else _fate(name, result.ir_model)
        return _concern(name, f"{kind}, {fate}", [use.node for use in tensors[name].uses()], result)
    if name in weights:
        weight = weights[name]
        readers = [nodes[weight.node]] if weight.node in nodes else []
        return _concern(name, f"slice, {list(weight.shape)}, {_spec(weight)}", readers, result)
    close = difflib.get_close_matches(name, [*nodes, *tensors, *weights], n=1, cutoff=0.5)
    hint = f" (did you mean '{close[0]}'?)" if close else "; without a name, explain shows the nodes of interest"
    raise UsageError(f"the model has no node or weight '{name}'{hint}")


def _concern(name: str, what: str, first: Sequence[ir.Node], result: Result[Any]) -> Concern:
    here = {node.name or node.op_type for node in _behind(first)}
    report = result.report
    return Concern(
        name,
        what,
        tuple(a for a in report.applications if a.node in here),
        tuple(d for d in report.declines if d.node in here or d.culprit == name),
    )


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    return (node for graph in model.graphs() for node in graph)


def _spec(weight: Weight) -> str:
    block = f"blocks of {weight.block_size}" if weight.block_size else "one scale per output"
    zero = "symmetric" if weight.symmetric else "with zero points"
    role = f" ({weight.role})" if weight.role else ""
    return f"to {weight.bits} bits in {block}, {zero}, by {weight.algorithm}{role}"


def _role(model: ir.Model, node: ir.Node) -> str:
    role = find_roles(model).get(node)
    if role is None:
        return ""
    places = (("layer", role.layer), ("expert", role.expert))
    return ", ".join(filter(None, (role.name, *(f"{what} {index}" for what, index in places if index is not None))))


def _fate(name: str, rewritten: ir.Model) -> str:
    return "stays" if any(name in graph.initializers for graph in rewritten.graphs()) else "disappears"


def _behind(first: Sequence[ir.Node]) -> set[ir.Node]:
    """The nodes, and those that read what they move, through further ones that only move it."""
    seen: set[ir.Node] = set()
    pending = list(first)
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op_type in _MOVES:
            pending.extend(use.node for value in node.outputs for use in value.uses())
    return seen
