"""How facts combine: sums, products, choices, contractions, and a weight applied to an activation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from rewriter.roles.facts import (
    DATA,
    Attended,
    Constant,
    Data,
    Fact,
    Ledger,
    Linear,
    Route,
    Score,
    Source,
    Stream,
    Table,
    Unit,
    attention_layer,
    depth_of,
    feed_forward_layer,
    source_of,
)


def merge_routes(routes: Sequence[Route]) -> Route:
    """Routing computed from routing: the expert where all that name one agree."""
    experts = {route.expert for route in routes if route.expert is not None}
    router = next((route.router for route in routes if route.router is not None), None)
    return Route(router, experts.pop() if len(experts) == 1 else None, any(route.dense for route in routes))


class Algebra:
    """The rules by which facts combine; what they learn about sources goes into the ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def point_of(self, fact: Fact) -> int:
        """The place on the stream from which a value was made."""
        if isinstance(fact, Stream | Attended):
            return fact.point
        if isinstance(fact, Linear | Table):
            return fact.source.point
        if isinstance(fact, Unit):
            return fact.up.point
        return self._ledger.new_point()

    def send(self, fact: Fact, route: Fact) -> Fact:
        """The value with rows chosen, permuted or scaled by routing."""
        if not isinstance(route, Route):
            return fact
        if isinstance(fact, Linear):
            fact.source.uses.add("mixed")
            _mark(fact.source, route)
        elif isinstance(fact, Unit):
            _mark(fact.gate, route)
            _mark(fact.up, route)
        elif isinstance(fact, Stream | Table):
            return Stream(self.point_of(fact), depth_of(fact), route)
        return route if fact is None or isinstance(fact, Constant) else fact

    def opaque(self, facts: Sequence[Fact]) -> Fact:
        """What an operator that is not understood returns."""
        if any(isinstance(fact, DATA) for fact in facts):
            return self._ledger.stream(facts)
        return _without_data(facts)

    def add(self, facts: Sequence[Fact]) -> Fact:
        """A sum, a difference, a maximum: biases and masks change nothing, two activations meet on the stream."""
        live: list[Data] = [fact for fact in facts if isinstance(fact, DATA)]
        if not live:
            return _without_data(facts)
        total: Data = live[0]
        for fact in live[1:]:
            total = self._add_two(total, fact)
        return total

    def _add_two(self, a: Data, b: Data) -> Data:
        if a == b:
            return a
        if isinstance(a, Score) or isinstance(b, Score):
            return a if isinstance(a, Score) else b
        if isinstance(a, Attended) and isinstance(b, Attended):
            return a if a.depth >= b.depth else b
        if isinstance(a, Linear) and isinstance(b, Linear):
            alike = a.source.point == b.source.point and not (a.source.closed and b.source.closed)
            if alike or a.source is b.source:
                return self._join([a, b])
        if isinstance(a, Stream) and isinstance(b, Stream) and a.point == b.point:
            return a if a.route is not None else b
        if isinstance(a, Unit) and isinstance(b, Unit) and a.up.point == b.up.point:
            return self._join_units([a, b])
        if isinstance(a, Table) and isinstance(b, Table) and a.source is b.source:
            return a
        for fact in (a, b):
            if isinstance(fact, Linear | Table):
                fact.source.uses.add("sum")
        return self._ledger.stream((a, b))

    def multiply(self, a: Fact, b: Fact) -> Fact:
        """A product or quotient: a scale, a gate, or routing weights."""
        if not isinstance(a, DATA):
            a, b = b, a
        if not isinstance(a, DATA):
            return _without_data((a, b))
        if not isinstance(b, DATA):
            return self.send(a, b)
        for kind in (Score, Attended, Unit):
            hit = a if isinstance(a, kind) else b if isinstance(b, kind) else None
            if hit is not None:
                return hit
        if isinstance(a, Linear) and isinstance(b, Linear):
            return self._multiply_linears(a, b)
        if isinstance(b, Linear):
            a, b = b, a
        if isinstance(a, Linear):
            if a.acted:  # it gates something that no linear made
                return b if isinstance(b, Stream) else self._ledger.stream((a, b))
            return a
        both_streams = isinstance(a, Stream) and isinstance(b, Stream)
        return self._add_two(a, b) if both_streams or a == b else self._ledger.stream((a, b))

    def _multiply_linears(self, a: Linear, b: Linear) -> Data:
        if a.source is b.source and a.part is b.part:
            return a._replace(acted=a.acted or b.acted)
        gate, other = (a, b) if a.acted else (b, a)
        if gate.acted and other.source.closed:
            if _several(other.source) or (gate.part is not None and _siblings(gate.source.gates, other.source)):
                gate.source.mixes = True
            gate.source.gates = other.source
            return other
        if gate.acted:
            return Unit(gate.source, other.source)
        return Linear(a.source) if a.source is b.source else self._ledger.stream((a, b))

    def choose(self, facts: Sequence[Fact]) -> Fact:
        """A concatenation or a selection: what the most telling of the inputs say together."""
        live: list[Data] = [fact for fact in facts if isinstance(fact, DATA)]
        if not live:
            return _without_data(facts)
        if len(live) == 1:
            return live[0]
        for kind in (Score, Attended):
            hit = next((fact for fact in live if isinstance(fact, kind)), None)
            if hit is not None:
                return hit
        units = [fact for fact in live if isinstance(fact, Unit)]
        if units:
            return self._join_units(units)
        linears = [fact for fact in live if isinstance(fact, Linear)]
        if linears:
            return self._join(linears)
        tables = [fact for fact in live if isinstance(fact, Table)]
        if len(tables) == len(live):
            return Table(self._ledger.union(table.source for table in tables))
        return self.add(live)

    def _join(self, linears: Sequence[Linear]) -> Linear:
        first = linears[0]
        part = first.part if all(linear.part is first.part for linear in linears) else None
        source = self._ledger.union(linear.source for linear in linears)
        return Linear(source, part, any(linear.acted for linear in linears))

    def _join_units(self, units: Sequence[Unit]) -> Unit:
        return Unit(self._ledger.union(unit.gate for unit in units), self._ledger.union(unit.up for unit in units))

    def contract(self, facts: Sequence[Fact]) -> Fact:
        """A product of matrices none of which is a weight: scores, attention, or a combine by routing weights."""
        live = [fact for fact in facts if isinstance(fact, DATA)]
        routes = [fact for fact in facts if isinstance(fact, Route)]
        if not live:
            return _without_data(facts)
        if routes:
            return self.send(self.add(live), merge_routes(routes))
        if len(live) == 1:
            return live[0]
        a, b = live[0], live[1]
        for gate, mixed in ((a, b), (b, a)):
            if isinstance(gate, Linear) and isinstance(mixed, Linear) and gate.acted and _several(mixed.source):
                gate.source.mixes = True
                return mixed
        if isinstance(b, Score):
            a, b = b, a
        depth = max(depth_of(a), depth_of(b))
        if isinstance(a, Score):
            return self.attend(a.q, a.k, b, depth) if a.soft else self._ledger.stream((a, b))
        return Score(source_of(a), source_of(b), depth)

    def attend(self, q: Source | None, k: Source | None, v: Fact, depth: int) -> Attended:
        """The output of an attention; its projections learn what they are.

        A cross-attention, whose keys come from elsewhere, stays in the layer of the self-attention before it.
        """
        depth = q.depth if q is not None else depth
        crossed = q is not None and (k is None or k.point != q.point)
        layer = depth // 2 if crossed and depth >= 0 and depth % 2 == 0 else attention_layer(depth)
        for source, use in ((q, "q"), (k, "k"), (source_of(v), "v")):
            if source is not None:
                source.uses.add(use)
                source.layer = layer if source.layer is None else source.layer
        return Attended(self._ledger.new_point(), 2 * layer)

    def apply(self, node: ir.Node, x: Fact, weight: Constant) -> Fact:
        """The output of a linear; what it reads tells what it is."""
        if not isinstance(x, DATA):
            return x if isinstance(x, Route) else None
        source = self._ledger.new(node, self.point_of(x), depth_of(x))
        source.gathers = weight.gathers
        source.elements = math.prod(weight.shape) if weight.shape else None
        source.expert = weight.expert
        source.stack = weight.root if weight.expert is not None else None
        if weight.route is not None:
            _mark(source, weight.route)
        if isinstance(x, Attended):
            source.uses.add("o")
            source.closed = True
            source.layer = x.depth // 2
        elif isinstance(x, Unit):
            self._close(source, x.gate, x.up)
        elif isinstance(x, Linear) and x.acted and not x.source.closed:
            self._close(source, None, x.source)
        elif isinstance(x, Linear):
            source.via = x.source
        elif isinstance(x, Stream) and x.route is not None:
            _mark(source, x.route)
        elif isinstance(x, Table):
            x.source.uses.add("sum")
        if source.layer is None and source.routed:
            source.layer = feed_forward_layer(source.depth)
        return Linear(source)

    def _close(self, source: Source, gate: Source | None, up: Source) -> None:
        """The linear is a down projection: an MLP ends here."""
        source.gate, source.up = gate, up
        for inner in {id(part): part for part in (gate, up) if part is not None}.values():
            inner.readers += 1
        source.closed = True
        source.layer = feed_forward_layer(source.depth)
        source.depth = 2 * source.layer + 1


def _several(source: Source) -> bool:
    """Whether the outputs of several MLPs that read one place were put side by side."""
    first, *others = source.parts or (source,)
    return bool(others) and all(_siblings(first, other) for other in others)


def _siblings(a: Source | None, b: Source) -> bool:
    """Whether both are the ends of MLPs, not of one, that read one place."""
    return a is not None and a is not b and None not in (a.up, b.up) and a.point == b.point


def _without_data(facts: Sequence[Fact]) -> Fact:
    routes = [fact for fact in facts if isinstance(fact, Route)]
    return merge_routes(routes) if routes else None


def _mark(source: Source, route: Route) -> None:
    source.routed = True
    if source.expert is None:
        source.expert = route.expert
    if route.router is not None:
        route.router.confirmed = True
