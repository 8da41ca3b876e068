"""The nodes that make up a block, and that nothing else reads what is inside of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from rewriter.facts import Facts
from rewriter.facts.size import Integers
from rewriter.graph.declines import NOT_AN_OUTPUT, ONE_READER, stays_float
from rewriter.graph.walk import walk
from rewriter.operators.form import is_experts
from rewriter.rule import Declined
from rewriter.rules.blocks.axes import Located, Uniform
from rewriter.rules.blocks.block import Block
from rewriter.rules.blocks.contents import Tokens
from rewriter.rules.blocks.hits import Hit, Hits, Outline
from rewriter.rules.blocks.mixing import Chosen
from rewriter.rules.blocks.routing import Routing
from rewriter.rules.blocks.rows import Arange, Counts, End, Inverse, Order, RowSlot, RowToken, Sorted
from rewriter.tensors import View

Tried = tuple[ir.Node, ir.Node | None]
"""A node, and the reader that went before it was tried."""


_OF_CHOICE = Outline | Chosen | Hit | Hits | Order | Sorted | RowToken | Inverse


@dataclass(frozen=True)
class MatchedNodes:
    """The nodes of a block.

    Attributes:
        nodes: between its output and what it reads, the last first.
        going: those that a rewrite takes away, and those by which they take parts of constants.
    """

    nodes: list[ir.Node]
    going: tuple[ir.Node, ...]


def matched_nodes_of(facts: Facts, block: Block, routing: Routing) -> MatchedNodes:
    """Returns the nodes of a block; declines where anything else reads what is inside."""
    stops = {block.x, *routing.read, *block.beside}
    reached, static = _reached(facts, block.out, stops)
    going = reached
    unit = block.mixing.stage == "unit"
    if (
        unit or routing.given is not None or routing.before is not None
    ):  # then the choice stays, and what it was made by
        router = block.mixing.router
        going, _ = _reached(facts, block.out, {*stops, router.indices, *router.node.outputs})
    if not any(_is_read_outside(node, going, block.out) for node in going):
        return MatchedNodes(list(reached), (*going, *static))
    nodes = _without_shared_shapes(facts, going, block)
    for node in nodes:
        for value in node.outputs:
            if value is block.out:
                continue
            if value.is_graph_output():
                raise Declined(f"'{value.name}' inside of the block is a graph output", node, remedy=NOT_AN_OUTPUT)
            for use in value.uses():
                if use.node not in nodes:
                    raise Declined(
                        f"'{value.name}' inside of the block is also read by {use.node.op_type}",
                        use.node,
                        remedy=ONE_READER,
                    )
    return MatchedNodes(list(reached), (*nodes, *static))


def _is_read_outside(node: ir.Node, inside: dict[ir.Node, None], out: ir.Value) -> bool:
    for value in node.outputs:
        if value is not out and (value.is_graph_output() or any(use.node not in inside for use in value.uses())):
            return True
    return False


def _reached(facts: Facts, out: ir.Value, stops: set[ir.Value]) -> tuple[dict[ir.Node, None], dict[ir.Node, None]]:
    """The nodes between ``out`` and ``stops``, and the nodes by which they take parts of constants."""
    nodes: dict[ir.Node, None] = {}
    static: dict[ir.Node, None] = {}

    def before(value: ir.Value) -> list[ir.Value]:
        producer = value.producer()
        if producer is None or value in stops:
            return []
        (static if facts.get(value, View) is not None else nodes)[producer] = None
        shape = producer.op_type == "Shape" and not producer.domain
        return [given for given in producer.inputs if given is not None and (not shape or _is_outline(facts, given))]

    for _ in walk([out], before, limit=None):
        pass
    return nodes, static


def _is_outline(facts: Facts, value: ir.Value) -> bool:
    """Whether a value of the block is made for its shape alone."""
    located = facts.get(value, Located)
    inside = located is not None and isinstance(
        located.content, Outline | Chosen | Hit | Hits | Order | Sorted | RowToken
    )
    return inside and all(use.node.op_type == "Shape" for use in value.uses())


def _without_shared_shapes(facts: Facts, reached: dict[ir.Node, None], block: Block) -> dict[ir.Node, None]:
    """The nodes without those that others read too and that cost nothing to keep: shapes, zeros, x by other names."""
    nodes = dict(reached)

    def spared(tried: Tried) -> list[Tried]:
        """Takes a node out that something outside reads; then what comes before it is read from outside too."""
        node, _ = tried
        if node not in nodes or block.out in node.outputs:
            return []
        flattened = node.op_type == "Reshape" and node.inputs[0] is block.x
        if not flattened and not all(_is_cheap(facts, value) for value in node.outputs):
            return []
        if not _is_read_outside(node, nodes, block.out):
            return []
        del nodes[node]
        return [(producer, node) for v in node.inputs if v is not None and (producer := v.producer()) is not None]

    start: list[Tried] = [(node, None) for node in reached]
    for _ in walk(start, spared, limit=None):
        pass
    return nodes


def _is_cheap(facts: Facts, value: ir.Value) -> bool:
    if value.dtype is not None and value.dtype.is_integer():
        return True
    located = facts.get(value, Located)
    if located is not None:
        return isinstance(located.content, Uniform | Tokens | Arange | Sorted | Order | RowSlot | Counts | End)
    return facts.get(value, Integers) is not None or facts.get(value, View) is not None


def require_weights_go(
    facts: Facts, going: Iterable[ir.Node], kept: Sequence[View], alike: Callable[[ir.Node], Sequence[ir.Node]]
) -> None:
    """Declines where a float weight would stay in the model beside the fused one.

    Args:
        facts: what is known.
        going: the nodes that a rewrite takes away.
        kept: what the operator reads, and may share with another.
        alike: what a rewrite of the block that a node is of takes away, where its experts are these, as those of layers
            that share them are; else nothing.
    """
    inside = set(going)

    def read(nodes: Iterable[ir.Node]) -> list[ir.Value]:
        return [value for node in nodes for value in node.inputs if value is not None]

    def others(value: ir.Value) -> Iterable[ir.Value]:
        view = facts.get(value, View)
        if view is None or view.rank < 2 or not view.dtype.is_floating_point():
            return
        if value.is_graph_output():
            raise stays_float(value, f"the weight '{value.name}'")
        for use in value.uses():
            if use.node in inside or (view in kept and is_experts(use.node)):
                continue
            more = alike(use.node)
            if use.node not in more:
                raise stays_float(use.node, f"the weight '{value.name}'")
            inside.update(more)
            yield from read(more)

    for _ in walk(read(going), others, limit=None):
        pass
