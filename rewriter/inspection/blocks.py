"""The MoE blocks of a model and the form in which each is written."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from rewriter.graph.contents import all_nodes
from rewriter.graph.walk import producers, readers, walk
from rewriter.inspection.weights import MOVES
from rewriter.operators.form import form_of, is_experts
from rewriter.operators.matmul_nbits import MATMUL_NBITS
from rewriter.operators.operator import input_at
from rewriter.roles import Role
from rewriter.roles.operators import GATHER, LINEAR, TOP_K
from rewriter.tensors import constant

_REACH = 48
"""Nodes that are looked at from a router to its TopK, and from an expert back to what chooses its rows."""


@dataclass(frozen=True)
class Block:
    """One MoE block.

    Attributes:
        layer: index of its layer, or None.
        form: how it is written, as ``unrolled: slices of a stack``.
        experts: how many there are; None where the graph does not show it.
        top_k: experts per token; None where the graph does not show it.
        activation: between the projections, where the operator names it.
        rows: which tokens an expert gets, where the block is written out; empty for an operator.
        nodes: how many nodes read its weights.
        first: name of the first of these.
    """

    layer: int | None
    form: str
    experts: int | None
    top_k: int | None
    activation: str
    rows: str
    nodes: int
    first: str


@dataclass(frozen=True)
class _Weight:
    """The constant that a linear reads.

    Attributes:
        rank: of the constant.
        first: extent of its first axis.
        seen: rank of what the linear sees, or None.
        dynamic: whether it was picked by an index that is computed.
    """

    rank: int
    first: int
    seen: int | None
    dynamic: bool


def find_blocks(model: ir.Model, roles: Mapping[ir.Node, Role]) -> tuple[Block, ...]:
    """Finds the blocks, in the order of the model."""
    written: dict[int | None, list[ir.Node]] = defaultdict(list)
    routers: dict[int | None, list[ir.Node]] = defaultdict(list)
    found: list[tuple[int, Block]] = []
    for place, node in enumerate(all_nodes(model)):
        role = roles.get(node, Role())
        if is_experts(node):
            found.append((place, _operator(node, role)))
        elif role.name.partition(".")[0] == "expert":
            if role.layer not in written:
                found.append((place, Block(role.layer, "", None, None, "", "", 0, "")))
            written[role.layer].append(node)
        elif role.name == "router":
            routers[role.layer].append(node)
    found.sort(key=lambda entry: entry[0])
    main = model.graph
    return tuple(
        block if block.form else _written(block.layer, written[block.layer], routers[block.layer], roles, main)
        for _, block in found
    )


def _operator(node: ir.Node, role: Role) -> Block:
    form = form_of(node)
    weight = input_at(node, 2)
    first = None if weight is None or weight.shape is None else weight.shape[0]
    experts = first if isinstance(first, int) else None
    return Block(role.layer, f"{node.op_type} node", experts, form.k, form.activation, "", 1, node.name or "")


def _written(
    layer: int | None,
    nodes: Sequence[ir.Node],
    routers: Sequence[ir.Node],
    roles: Mapping[ir.Node, Role],
    main: ir.Graph,
) -> Block:
    linears = [node for node in nodes if node.op_type in LINEAR]
    weights = [weight for node in linears if (weight := _weight(node)) is not None]
    indices = {roles[node].expert for node in linears} - {None}
    downs = sum(roles[node].name == "expert.down" for node in linears)
    apart = max(downs, len(indices))
    form = _form(weights, apart=apart, quantized=any(n.op_type == MATMUL_NBITS.name for n in linears))
    if any(node.graph is not main for node in linears):
        form += ", in a subgraph or function"
    stacks = [weight.first for weight in weights if weight.rank >= 3]
    experts = len(indices) or max(stacks, default=0) or downs
    top_k = next((k for router in routers if (k := _top_k(router)) is not None), None)
    rows = _rows(linears[0]) if linears and apart > 1 else ""
    return Block(layer, form, experts or None, top_k, "", rows, len(nodes), nodes[0].name or "")


def _form(weights: Sequence[_Weight], *, apart: int, quantized: bool) -> str:
    """Returns the form; ``apart`` experts have a linear of their own."""
    if any(weight.dynamic for weight in weights):
        return "unrolled: slices by a computed index" if apart > 1 else "batched: weights gathered for each token"
    if any(weight.seen is not None and weight.seen >= 3 for weight in weights) and apart < 2:
        return "dense: every expert on every token, by a batched product"
    if quantized:
        return "unrolled: a quantized matrix for each expert"
    if any(weight.rank >= 3 for weight in weights):
        return "unrolled: slices of a stack"
    return "unrolled: a matrix for each expert"


def _weight(node: ir.Node) -> _Weight | None:
    """Follows the operands of a linear back to a constant, right to left."""
    for operand in reversed(node.inputs[:2]):
        value = operand
        dynamic = False
        for steps in range(_REACH):
            view = None if value is None else constant(value)
            if view is not None:
                seen = operand.shape.rank() if operand is not None and operand.shape is not None else None
                return _Weight(view.rank, view.shape[0] if view.rank else 1, seen if steps else view.rank, dynamic)
            producer = None if value is None else value.producer()
            if producer is None or producer.op_type not in MOVES | GATHER:
                break
            index = producer.inputs[1] if producer.op_type in GATHER and len(producer.inputs) > 1 else None
            dynamic |= index is not None and constant(index) is None
            value = producer.inputs[0]
    return None


def _top_k(router: ir.Node) -> int | None:
    """Returns K of the first TopK behind a router; None where it is computed."""
    for node in _reached([router], forward=True):
        if node.op_type in TOP_K:
            if node.op_type == "ArgMax":
                return 1
            k = node.inputs[1] if len(node.inputs) > 1 else None
            view = None if k is None else constant(_unmoved(k))
            return int(view.number) if view is not None and view.size == 1 else None
    return None


def _unmoved(value: ir.Value) -> ir.Value:
    """The value from which movement operators made this one."""

    def before(at: ir.Value) -> list[ir.Value]:
        producer = at.producer()
        return producers(at)[:1] if producer is not None and producer.op_type in MOVES else []

    *_, first = walk([value], before, limit=None)
    return first


def _rows(linear: ir.Node) -> str:
    """Says which tokens an expert's linear gets, by what chooses its rows."""
    x = linear.inputs[0]
    producer = x.producer() if x is not None else None
    kinds = {node.op_type for node in _reached([producer] if producer is not None else [], forward=False)}
    if kinds & {"CumSum", "Range"}:
        return "sorted by expert (grouped)"
    return "its own (NonZero)" if "NonZero" in kinds else "every one (masked)"


def _reached(start: Iterable[ir.Node], *, forward: bool) -> Iterator[ir.Node]:
    """The nodes around, nearest first, not beyond what multiplies by weights."""
    first = set(start) if forward else set()

    def around(node: ir.Node) -> Iterable[ir.Node]:
        if node.op_type in LINEAR and node not in first:
            return ()
        if forward:
            return (reader for value in node.outputs for reader in readers(value))
        return (p for value in node.inputs if value is not None and (p := value.producer()) is not None)

    return itertools.islice(walk(start, around, limit=None), _REACH)
