"""Cutting a model into stages, each small enough to be loaded alone: layers, cut where the least crosses."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from rewriter.graph.contents import is_random, subgraphs

_UNCUT = 1 << 40
"""What a value counts for that cannot cross from one part to another."""


@dataclass(frozen=True)
class Stage:
    """A part of a graph that follows on others.

    Attributes:
        model: the part as a model; its tensors are those of the whole.
        inputs: names of what it reads of the inputs of the whole.
        carried: names of what it reads of earlier stages.
        kept: names of what later stages read of it.
        wanted: names of what was asked for and is computed here.
        done: names of what no later stage reads.
    """

    model: ir.Model
    inputs: tuple[str, ...]
    carried: tuple[str, ...]
    kept: tuple[str, ...]
    wanted: tuple[str, ...]
    done: tuple[str, ...]


def stages(
    model: ir.Model, wanted: Collection[ir.Value], most: int, alone: Collection[ir.Value] = ()
) -> Iterator[Stage]:
    """Yields the parts of a model in order; what only constants make belongs to whatever reads it.

    Args:
        model: nodes in topological order.
        wanted: values of the main graph to compute.
        most: bytes of constants of a part, but for a single node that reads more.
        alone: outputs of nodes each of which is to be a part of its own.
    """
    flow = _Flow(model.graph, wanted)
    cuts = flow.cuts(most, {value.producer() for value in alone})
    names = {value: value.name or "" for node in flow.nodes for value in node.outputs}
    for first, last in itertools.pairwise(cuts):
        nodes = set(flow.nodes[first:last])
        read = dict.fromkeys(value for node in flow.nodes[first:last] for value in flow.reads[node])
        made = [value for node in flow.nodes[first:last] for value in node.outputs]
        inputs = [value for value in read if value.is_graph_input()]
        carried = [value for value in read if value.producer() is not None and value.producer() not in nodes]
        kept = [value for value in made if flow.last.get(value, -1) >= last]
        here = [value for value in made if value in wanted]
        outputs = list(dict.fromkeys((*kept, *here)))
        if not outputs:
            continue
        graph = ir.convenience.extract(model.graph, [*inputs, *carried], outputs)
        part = ir.Model(graph, ir_version=model.ir_version, functions=[f.clone() for f in model.functions.values()])
        yield Stage(
            part,
            tuple(value.name or "" for value in inputs),
            tuple(names[value] for value in carried),
            tuple(names[value] for value in kept),
            tuple(names[value] for value in here),
            tuple(names[value] for value in carried if flow.last[value] < last),
        )


class _Flow:
    """Of the nodes that depend on a graph's inputs: which values and which constants each reads."""

    def __init__(self, graph: ir.Graph, wanted: Collection[ir.Value]) -> None:
        constants: dict[ir.Node, frozenset[ir.Value]] = {}
        self.nodes: list[ir.Node] = []
        self.reads: dict[ir.Node, list[ir.Value]] = {}
        self._constants: list[frozenset[ir.Value]] = []
        for node in graph:
            read = list(_read(node, graph))
            own = {value for value in read if value.is_initializer() and not value.is_graph_input()}
            moving = []
            for value in read:
                producer = value.producer()
                if value.is_graph_input() or (producer is not None and producer not in constants):
                    moving.append(value)
                elif producer is not None:
                    own |= constants[producer]
            if moving or any(value in wanted for value in node.outputs) or is_random(node):
                self.nodes.append(node)
                self.reads[node] = moving
                self._constants.append(frozenset(own))
            else:
                constants[node] = frozenset(own)
        self.last = {value: index for index, node in enumerate(self.nodes) for value in self.reads[node]}

    def cuts(self, most: int, alone: Collection[ir.Node | None] = ()) -> Sequence[int]:
        """Returns where the parts begin, and the end; a node that is to be alone has a part of its own."""
        crossing = self._crossing()
        found, seen, size = [0], set[ir.Value](), 0
        for index, constants in enumerate(self._constants):
            added = sum(_nbytes(value) for value in constants - seen)
            apart = self.nodes[index] in alone or (index > 0 and self.nodes[index - 1] in alone)
            if apart and index > found[-1]:
                found.append(index)
                seen, size, added = set(), 0, sum(map(_nbytes, constants))
            elif size + added > most and index > found[-1]:
                earliest = found[-1] + 1 + (index - found[-1]) // 2
                cut = min(range(min(earliest, index), index + 1), key=lambda at: (crossing[at], -at))
                if crossing[cut] < _UNCUT:
                    found.append(cut)
                    seen = {value for held in self._constants[cut:index] for value in held}
                    size = sum(map(_nbytes, seen))
                    added = sum(_nbytes(value) for value in constants - seen)
            seen |= constants
            size += added
        return (*found, len(self.nodes))

    def _crossing(self) -> list[int]:
        """How many values are made before each node, and read there or later."""
        steps = [0] * (len(self.nodes) + 2)
        for index, node in enumerate(self.nodes):
            for value in node.outputs:
                last = self.last.get(value, -1)
                if last > index:
                    weight = _UNCUT if _is_sequence(node, value) else 1
                    steps[index + 1] += weight
                    steps[last + 1] -= weight
        total, found = 0, []
        for step in steps:
            total += step
            found.append(total)
        return found


def _read(node: ir.Node, graph: ir.Graph) -> Iterator[ir.Value]:
    """Yields what a node, and the graphs that it holds, read of the graph that it stands in."""
    yield from (value for value in node.inputs if value is not None)
    for inner in subgraphs(node):
        for other in ir.traversal.RecursiveGraphIterator(inner):
            yield from (value for value in other.inputs if value is not None and value.graph is graph)


def _is_sequence(node: ir.Node, value: ir.Value) -> bool:
    """Whether a value is no tensor, which is not carried from part to part."""
    made = node.op_type == "SplitToSequence" or node.op_type.startswith(("Sequence", "Optional"))
    return (made and node.op_type not in ("SequenceAt", "SequenceLength")) or (
        value.type is not None and not isinstance(value.type, ir.TensorType)
    )


def _nbytes(value: ir.Value) -> int:
    return 0 if value.const_value is None else value.const_value.nbytes
