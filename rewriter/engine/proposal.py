"""A match and its replacement, complete before anything of the model changes; and what a commit made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import NamedTuple

import onnx_ir as ir

from rewriter.graph.contents import name_of
from rewriter.graph.walk import producers, walk
from rewriter.quantize.job import PartTensor, QuantizationJob
from rewriter.rule import Fed


@dataclass(eq=False)
class Rewrite:
    """A match and its replacement, both complete; nothing of the model has changed yet.

    Attributes:
        rule: name of the rule.
        graph: the graph that holds the root (of a function, its body).
        root: the node at which the pattern was matched.
        matched: nodes of the match.
        outputs: old value -> the value that takes its place.
        nodes: new nodes, in order.
        initializers: new constants.
        opsets: domain -> version that the new nodes need.
        imports: domain -> version that the graph, or the function it is in, has.
        fed: what the rule knows of values that the matched nodes read.
        roles: what the weights of the nodes that make these new values are for.
        layouts: matched node -> the layout of its weights, where its metadata does not tell.
        later: what its rule would make at nodes that come after the root, the last one first; each is discarded when
            the next one is asked for.
    """

    rule: str
    graph: ir.Graph
    root: ir.Node
    matched: Sequence[ir.Node]
    outputs: Mapping[ir.Value, ir.Value]
    nodes: Sequence[ir.Node]
    initializers: Sequence[ir.Value]
    opsets: Mapping[str, int]
    imports: Mapping[str, int]
    fed: Mapping[ir.Value, Fed] = field(default_factory=dict)
    roles: Mapping[ir.Value, str] = field(default_factory=dict)
    layouts: Mapping[ir.Node, str] = field(default_factory=dict)
    later: Callable[[], Iterator[Rewrite]] = lambda: iter(())

    @property
    def where(self) -> str:
        """How reports name the root; not after the commit, when its output's name is the replacement's."""
        return name_of(self.root)

    @property
    def jobs(self) -> list[QuantizationJob]:
        """The weights that it quantizes, each once."""
        found: dict[object, QuantizationJob] = {}
        for value in self.initializers:
            tensor = value.const_value
            if isinstance(tensor, PartTensor):
                found.update((job.key, job) for job in tensor.jobs)
        return list(found.values())

    def discard(self) -> None:
        """Unhooks the new nodes from the model's values; the rewrite cannot be used afterwards."""
        for node in self.nodes:
            for index in range(len(node.inputs)):
                node.replace_input_with(index, None)


class Change(NamedTuple):
    """What a commit did.

    Attributes:
        removed: nodes that left the model, dead producers included, but none of those in their bodies.
        added: nodes that came.
        rewired: nodes that read other values now.
    """

    removed: Sequence[ir.Node]
    added: Sequence[ir.Node]
    rewired: Sequence[ir.Node]


def may_be_out_of_order(rewrite: Rewrite) -> bool:
    """Whether a new node reads what the root need not come after."""
    new = set(rewrite.nodes)
    given = (value for node in rewrite.nodes for value in node.inputs if value is not None)
    read = {value for value in given if (producer := value.producer()) is not None and producer not in new}
    return bool(read) and not read.issubset(v for node in rewrite.matched for v in (*node.inputs, *node.outputs))


def feeds_itself(rewrite: Rewrite) -> bool:
    """Whether a new output would be computed, by way of the rest of the graph, from itself."""
    old = set(rewrite.outputs)
    needs = {value: _reached(new, old) for value, new in rewrite.outputs.items()}
    try:
        TopologicalSorter(needs).prepare()
    except CycleError:
        return True
    return False


def _reached(value: ir.Value, wanted: set[ir.Value]) -> set[ir.Value]:
    """The wanted values from which ``value`` is computed; what lies behind them is not looked at."""
    seen = walk([value], lambda at: [] if at in wanted else producers(at), limit=None)
    return wanted.intersection(seen)
