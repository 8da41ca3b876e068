"""One pass forward over a graph and its bodies: a fact for every value, a source for every node that reads a weight.

Facts of a value depend on facts of the operator's inputs only, so the pass is linear in the nodes and never looks back;
what an operator learns about an earlier node is written into that node's source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from rewriter.facts import Facts
from rewriter.graph.contents import subgraphs
from rewriter.operators.gather_block_quantized import GATHER_BLOCK_QUANTIZED
from rewriter.operators.matmul_nbits import MATMUL_NBITS, attributes_of
from rewriter.roles import algebra, operators, weights
from rewriter.roles.facts import (
    DATA,
    Constant,
    Fact,
    Ledger,
    Linear,
    Route,
    Score,
    Source,
    Stream,
    Table,
    depth_of,
    feed_forward_layer,
    source_of,
)
from rewriter.roles.walk import visits

Outputs = Fact | list[Fact]  # one fact for every output alike, or one each


class Flow:
    """The facts of one graph (a model's main graph or a function's body) and the ledger of its sources."""

    def __init__(self, graph: ir.Graph | ir.Function, known: Facts) -> None:
        self.ledger = Ledger()
        self.facts: dict[ir.Value, Fact] = {}
        self._known = known
        self.lookups: dict[Source, ir.Value] = {}  # table source -> ids
        self._rules = algebra.Algebra(self.ledger)
        for node, done in visits(graph, _HANDLERS):
            if done:
                self._leave(node)
            else:
                self._visit(node)
        self._end(graph)

    def _end(self, graph: ir.Graph | ir.Function) -> None:
        for output in graph.outputs:
            fact = self.facts.get(output)
            if isinstance(fact, Linear | Table) and (output.dtype is None or output.dtype.is_floating_point()):
                fact.source.uses.add("out")
                last = output.shape[-1] if output.shape else None
                if isinstance(fact, Linear):
                    fact.source.size = last if isinstance(last, int) else self._width(fact.source.node)

    def _width(self, node: ir.Node | None) -> int | None:
        """Output features of a linear, read off its weight: a model may declare a name for them."""
        if node is None or node.op_type not in ("MatMul", "Gemm", MATMUL_NBITS.name):
            return None
        if node.op_type == MATMUL_NBITS.name:
            return attributes_of(node).n or None
        weight = self.facts.get(node.inputs[1]) if node.inputs[1] is not None else None
        if not isinstance(weight, Constant) or weight.shape is None or len(weight.shape) < 2:
            return None
        return weight.shape[-2 if _integer(node, "transB") else -1]

    def read(self, value: ir.Value | None) -> Fact:
        """The fact of an input; a router's output is routing as soon as its TopK has been seen."""
        if value is None:
            return None
        fact = self.facts.get(value)
        if fact is None:
            if value in self.facts or value.producer() is not None:
                return None
            fact = self.facts[value] = self._leaf(value)
        if isinstance(fact, Linear) and fact.source.router:
            return Route(fact.source, None, dense=True)
        return fact

    def _leaf(self, value: ir.Value) -> Fact:
        if value.const_value is not None or value.is_initializer():
            return weights.stored(self._known, value)
        if value.dtype is None or value.dtype.is_floating_point():
            return Stream(self.ledger.new_point(), -1)
        return None

    def _visit(self, node: ir.Node) -> None:
        op_type = node.op_type
        if op_type in operators.CONTROL:
            self._enter(node)
            return
        if op_type == "Constant":
            outputs: Outputs = weights.stored(self._known, node.outputs[0]) if node.outputs else None
        else:
            outputs = self._apply(node, op_type, list(map(self.read, node.inputs)))
        if isinstance(outputs, list):
            self.facts.update(zip(node.outputs, outputs, strict=False))
        else:
            for value in node.outputs:
                self.facts[value] = outputs

    def _apply(self, node: ir.Node, op_type: str, facts: list[Fact]) -> Outputs:
        if op_type in operators.SHAPE or not facts:
            return None
        if op_type not in _FOLLOWED:
            known = [fact for fact in facts if isinstance(fact, Constant)]
            if len(known) == len(node.inputs) - node.inputs.count(None):
                return weights.computed(known, node) if known else None
        handler = _HANDLERS.get(op_type)
        return handler(self, node, facts) if handler is not None else self._rules.opaque(facts)

    # Bodies of If, Loop and Scan; those of any other operator stand for themselves.

    def _enter(self, node: ir.Node) -> None:
        if node.op_type == "If":
            return
        scanned = _integer(node, "num_scan_inputs")
        for body in subgraphs(node):
            for index, (inner, outer) in enumerate(zip(body.inputs, node.inputs, strict=False)):
                fact = self.read(outer)
                if isinstance(fact, Constant):  # what is carried may change; what is scanned comes row by row
                    rows = index >= len(node.inputs) - scanned
                    fact = fact._replace(shape=None, rank=fact.rank - 1) if rows else None
                self.facts[inner] = fact

    def _leave(self, node: ir.Node) -> None:
        bodies = subgraphs(node)
        if node.op_type not in operators.CONTROL:
            for body in bodies:
                self._end(body)
            return
        first = 1 if node.op_type == "Loop" else 0  # the body's condition is no output
        for index, value in enumerate(node.outputs, first):
            inner = [body.outputs[index] for body in bodies if index < len(body.outputs)]
            self.facts[value] = self._rules.choose([self.read(output) for output in inner])

    # Operators, by the way in which they treat their inputs.

    def _movement(self, node: ir.Node, facts: list[Fact]) -> Outputs:
        moved = facts[0]
        if isinstance(moved, Constant):
            return list(weights.parts(self._known, node, moved))
        if node.op_type not in operators.PARTS:
            return moved
        if isinstance(moved, Linear):
            for route in facts[1:]:
                self._rules.send(moved, route)
            return [moved._replace(part=value) for value in node.outputs]
        if isinstance(moved, Route) and moved.dense:
            columns = weights.columns(self._known, node)
            return [moved._replace(expert=column, dense=False) for column in columns] or moved
        return moved

    def _activation(self, node: ir.Node, facts: list[Fact]) -> Outputs:
        fact = facts[0]
        if isinstance(fact, Linear):
            return fact._replace(acted=True)
        if isinstance(fact, Score) and node.op_type in operators.SOFTMAX:
            return fact._replace(soft=True)
        return fact

    def _add(self, node: ir.Node, facts: list[Fact]) -> Outputs:
        return self._rules.add(facts)

    def _gated_add(self, node: ir.Node, facts: list[Fact]) -> Outputs:
        sides = [facts[0], self._rules.multiply(facts[1], _acted(facts[2]))] if len(facts) == 3 else facts
        return self._rules.add(sides)

    def _multiply(self, node: ir.Node, facts: list[Fact]) -> Outputs:
        return self._rules.multiply(facts[0], facts[1] if len(facts) > 1 else None)

    def _choose(self, node: ir.Node, facts: list[Fact]) -> Outputs:
        if node.op_type == "Where":
            return self._rules.send(self._rules.choose(facts[1:]), facts[0])
        return self._rules.choose(facts)

    def _scatter(self, node: ir.Node, facts: list[Fact]) -> Outputs:
        written = self._rules.choose(facts[:1] + facts[2:])
        chosen = facts[1] if len(facts) > 1 else None
        if isinstance(chosen, Route) and not isinstance(written, DATA):
            return Route(chosen.router, None, dense=True)
        return self._rules.send(written, chosen)

    def _compare(self, node: ir.Node, facts: list[Fact]) -> Outputs:
        routes = [fact for fact in facts if isinstance(fact, Route)]
        if not routes:
            return None
        route = algebra.merge_routes(routes)
        if node.op_type == "OneHot":
            return route._replace(dense=True)
        for value, other in zip(node.inputs, facts, strict=True):
            if node.op_type == "Equal" and isinstance(other, Constant):
                index = weights.single(self._known, value)
                return Route(route.router, index) if index is not None else route._replace(dense=bool(other.shape))
        return route._replace(dense=False) if node.op_type == "NonZero" else route

    def _top_k(self, node: ir.Node, facts: list[Fact]) -> Outputs:
        scores = facts[0]
        if isinstance(scores, Linear):
            if node.op_type == "TopK":
                scores.source.router = True
                scores.source.layer = feed_forward_layer(scores.source.depth)
            return Route(scores.source)
        if isinstance(scores, Route):
            return Route(scores.router)
        return Route() if isinstance(scores, Stream) else None

    def _gather(self, node: ir.Node, facts: list[Fact]) -> Outputs:
        if len(facts) < 2:
            return self._rules.opaque(facts)
        data, chosen = facts[0], facts[1]
        if isinstance(data, Constant):
            return self._gather_constant(node, data, chosen)
        if isinstance(data, Route):
            picked = weights.columns(self._known, node) if isinstance(chosen, Constant) and data.dense else []
            return Route(data.router, picked[0] if picked else data.expert)
        if isinstance(data, Linear) and isinstance(chosen, Constant):
            return data._replace(part=node.outputs[0])
        if data is None:
            return chosen if isinstance(chosen, Route) else None
        return self._rules.send(data, chosen)

    def _gather_constant(self, node: ir.Node, data: Constant, chosen: Fact) -> Fact:
        if isinstance(chosen, Constant):
            return weights.parts(self._known, node, data)[0]
        quantized = node.op_type == GATHER_BLOCK_QUANTIZED.name
        if isinstance(chosen, Route):
            if data.rank < 3:
                return Route(chosen.router, chosen.expert)  # a bias or a scale per expert
            return data._replace(gathers=(*data.gathers, node), route=chosen, shape=None)
        if data.rank >= 3 and not quantized:
            return data._replace(gathers=(*data.gathers, node), shape=None)
        dtype = data.root.dtype
        if data.rank < 2 or (not quantized and dtype is not None and not dtype.is_floating_point()):
            return None
        source = self.ledger.new(node, self.ledger.new_point(), -1)
        source.size = data.shape[0] if data.shape else None
        self.lookups[source] = node.inputs[1] or node.outputs[0]
        return Table(source)

    # Readers of weights.

    def _linear(self, node: ir.Node, facts: list[Fact]) -> Outputs:
        operands = facts if node.op_type == "Einsum" else facts[:2]
        weight = next((fact for fact in operands if isinstance(fact, Constant)), None)
        others = [fact for fact in operands if not isinstance(fact, Constant)]
        if weight is not None:
            x = others[0] if len(others) == 1 else self._rules.contract(others)
            return self._rules.apply(node, x, weight)
        return self._rules.contract(others)

    def _experts(self, node: ir.Node, facts: list[Fact]) -> Outputs:
        x = facts[0]
        for slot in (1, 14):
            logits = facts[slot] if slot < len(facts) else None
            if isinstance(logits, Linear):
                logits.source.router = logits.source.confirmed = True
                logits.source.layer = feed_forward_layer(logits.source.depth)
            elif isinstance(logits, Route) and logits.router is not None:
                logits.router.confirmed = True
        source = self.ledger.new(node, self._rules.point_of(x), depth_of(x))
        source.uses.add("experts")
        source.routed = True
        source.layer = feed_forward_layer(depth_of(x))
        source.depth = 2 * source.layer + 1
        return Stream(self.ledger.new_point(), source.depth)

    def _attention(self, node: ir.Node, facts: list[Fact]) -> Outputs:
        inputs: Sequence[Fact] = [*facts, None, None][:3]
        if isinstance(inputs[1], Constant):  # com.microsoft::Attention holds the packed projection itself
            packed = self._rules.apply(node, inputs[0], inputs[1])
            inputs = (packed, packed, packed)
        elif len(node.inputs) < 2 or node.inputs[1] is None:
            inputs = (inputs[0], inputs[0], inputs[0])
        elif len(node.inputs) < 3 or node.inputs[2] is None:
            inputs = (inputs[0], inputs[1], inputs[1])
        attended = self._rules.attend(source_of(inputs[0]), source_of(inputs[1]), inputs[2], max(map(depth_of, inputs)))
        return [attended, *[None] * (len(node.outputs) - 1)]


def _integer(node: ir.Node, name: str) -> int:
    """An integer attribute; 0 where it is absent, or of another type."""
    attribute = node.attributes.get(name)
    return attribute.value if attribute is not None and isinstance(attribute.value, int) else 0


def _acted(fact: Fact) -> Fact:
    return fact._replace(acted=True) if isinstance(fact, Linear) else fact


_HANDLERS: Mapping[str, Callable[[Flow, ir.Node, list[Fact]], Outputs]] = {
    op_type: handler
    for table, handler in (
        (operators.MOVEMENT, Flow._movement),
        (operators.ACTIVATION, Flow._activation),
        (operators.ADD, Flow._add),
        (operators.MULTIPLY, Flow._multiply),
        (operators.CHOOSE, Flow._choose),
        (operators.SCATTER, Flow._scatter),
        (operators.COMPARE, Flow._compare),
        (operators.TOP_K, Flow._top_k),
        (operators.GATHER, Flow._gather),
        (operators.LINEAR, Flow._linear),
        (operators.FUSED_EXPERTS, Flow._experts),
        (operators.ATTENTION, Flow._attention),
    )
    for op_type in table
} | {"GatedAdd": Flow._gated_add}

_FOLLOWED = operators.MOVEMENT | operators.GATHER | operators.FUSED_EXPERTS  # handlers that follow parts of constants
