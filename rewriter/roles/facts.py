"""What is known about a value, and the ledger of weight readers that later operators write their findings into.

A fact is None where the value tells nothing: positions, masks, shapes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import onnx_ir as ir


@dataclass(eq=False, slots=True)
class Source:
    """A node that reads a weight, or the union of several whose outputs were merged.

    Attributes:
        node: the node; None for a union.
        parts: the sources of a union.
        point: the place on the residual stream that it reads.
        depth: how deep its output is (`attention_layer` says how it is counted).
        layer: index of the layer, once an operator has told.
        uses: what later operators made of the output: ``q``, ``k``, ``v``, ``o``, ``gate``, ``up`` ...
        expert: expert index, where it is static.
        stack: the constant whose slice along axis 0 is the weight.
        size: rows of a table, or features of a linear that ends in a graph output; None where unknown.
        elements: elements of a linear's weight, or None.
        gathers: the nodes that pick the weight at run time.
        gate: for a down projection, the source that goes through the activation.
        up: for a down projection, the source that does not.
        readers: how many down projections read it as gate or up.
        via: the plain linear that it reads, as in a low-rank pair.
        gates: the source whose output this one scales, through a sigmoid.
        closed: the output is a block's (down or o projection), not a block's inside.
        routed: it belongs to a routed expert.
        router: its output reaches a TopK.
        confirmed: the chosen indices or weights reach an expert.
        mixes: its output weighs MLPs that all run: a mixture without a TopK.
        family: ``expert``, ``shared_expert`` or ``mlp``.
    """

    node: ir.Node | None
    point: int = -1
    depth: int = -1
    parts: tuple[Source, ...] = ()
    layer: int | None = None
    uses: set[str] = field(default_factory=set)
    expert: int | None = None
    stack: ir.Value | None = None
    size: int | None = None
    elements: int | None = None
    gathers: tuple[ir.Node, ...] = ()
    gate: Source | None = None
    up: Source | None = None
    readers: int = 0
    via: Source | None = None
    gates: Source | None = None
    closed: bool = False
    routed: bool = False
    router: bool = False
    confirmed: bool = False
    mixes: bool = False
    family: str = ""


class Stream(NamedTuple):
    """The residual stream, normed or not, and every activation of which no more is known."""

    point: int
    depth: int
    route: Route | None = None  # set where rows were sent to experts


class Linear(NamedTuple):
    """What a linear made, moved, scaled, normed, shifted by a bias; ``part`` is the slice of it, None for all."""

    source: Source
    part: ir.Value | None = None
    acted: bool = False  # went through an activation


class Unit(NamedTuple):
    """act(gate) * up: the inside of a gated MLP."""

    gate: Source
    up: Source


class Score(NamedTuple):
    """A product of two activations: attention scores, or weights once softmaxed."""

    q: Source | None
    k: Source | None
    depth: int
    soft: bool = False


class Attended(NamedTuple):
    """What an attention returns."""

    point: int
    depth: int


class Table(NamedTuple):
    """Rows looked up in a constant table: an embedding, or a rotary cache."""

    source: Source


class Route(NamedTuple):
    """What derives from a router alone: ids, weights, masks, row numbers; ``dense`` has a column per expert."""

    router: Source | None = None
    expert: int | None = None
    dense: bool = False


class Constant(NamedTuple):
    """A constant, or a constant's part; ``gathers`` are the nodes that pick it at run time, by ``route``."""

    root: ir.Value
    shape: tuple[int, ...] | None
    rank: int
    expert: int | None = None
    gathers: tuple[ir.Node, ...] = ()
    route: Route | None = None


Fact: TypeAlias = Stream | Linear | Unit | Score | Attended | Table | Route | Constant | None
Data: TypeAlias = Stream | Linear | Unit | Score | Attended | Table
DATA = (Stream, Linear, Unit, Score, Attended, Table)


def attention_layer(depth: int) -> int:
    """Layer of an attention that reads at ``depth``.

    Depth counts the blocks passed: -1 before layer 0, 2l after the attention of layer l, 2l + 1 after its MLP or MoE.
    """
    return depth // 2 + 1


def feed_forward_layer(depth: int) -> int:
    """Layer of an MLP or MoE that reads at ``depth``: the attention's before it, or the next."""
    return (depth + 1) // 2


def depth_of(fact: Fact) -> int:
    """How deep the value is; routing and constants have no depth of their own."""
    if isinstance(fact, Stream | Score | Attended):
        return fact.depth
    if isinstance(fact, Linear | Table):
        return fact.source.depth
    if isinstance(fact, Unit):
        return max(fact.gate.depth, fact.up.depth)
    return -1


def source_of(fact: Fact) -> Source | None:
    """The linear that made the value, where one did."""
    return fact.source if isinstance(fact, Linear) else None


class Ledger:
    """Every source in order of creation, so that what a source is made of always precedes it."""

    def __init__(self) -> None:
        self.sources: list[Source] = []
        self._points = 0

    def new_point(self) -> int:
        """A place on the residual stream not seen before."""
        self._points += 1
        return self._points

    def new(self, node: ir.Node, point: int, depth: int) -> Source:
        """Enters a node that reads a weight."""
        source = Source(node, point, depth)
        self.sources.append(source)
        return source

    def union(self, sources: Iterable[Source]) -> Source:
        """One source that stands for all; a source joined with itself is itself."""
        parts = tuple(dict.fromkeys(sources))
        if len(parts) == 1:
            return parts[0]
        joined = Source(None, parts[0].point, max(part.depth for part in parts), parts)
        joined.closed = all(part.closed for part in parts)
        self.sources.append(joined)
        return joined

    def stream(self, facts: Iterable[Fact]) -> Stream:
        """A new place on the stream, as deep as the deepest of what it is made of."""
        return Stream(self.new_point(), max((depth_of(fact) for fact in facts), default=-1))
