"""The inside of a router: the linears before its last one, where they serve nothing else.

From the last linear of each router the graph is walked backwards through operators that transform values in place
(norms, activations, sums, products, linears), and on only where every reader of a value belongs to a router. So the
walk ends at the residual stream, which the experts read too, at what a graph returns or hands to a body, at a TopK, an
attention's projections and an expert; it takes each node in once, and looks at it once per reader that it took in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import onnx_ir as ir

from rewriter.graph.walk import walk
from rewriter.roles import operators
from rewriter.roles.facts import Source, feed_forward_layer

_PASSED: Final = (
    operators.LINEAR | operators.MOVEMENT | operators.ACTIVATION | operators.ADD | operators.MULTIPLY | operators.CHOOSE
)


def find_hidden_layers(sources: Sequence[Source]) -> None:
    """Marks the hidden linears of routers as routers; a router is in the layer of what its first linear reads.

    Only routers whose choice or weights reach experts have an inside: the head of a model that samples has none.

    Args:
        sources: the ledger's, in order, with what is known of unions told to their parts.
    """
    linears = {source.node: source for source in sources if source.node is not None}
    inside = _walk_back([node for node, source in linears.items() if source.confirmed or source.mixes], linears)
    for node, source in linears.items():
        if node not in inside:
            continue
        hidden = not (source.confirmed or source.mixes)
        source.router = True
        reads = source.up or source.via
        if reads is not None and reads.node in inside:
            source.layer = reads.layer
        elif source.layer is None or (hidden and not source.closed):
            source.layer = feed_forward_layer(source.depth)


def _walk_back(routers: Sequence[ir.Node], linears: Mapping[ir.Node, Source]) -> set[ir.Node]:
    """The routers' last linears, and every node before them that serves only routers."""
    inside = set(routers)

    def taken(node: ir.Node) -> list[ir.Node]:
        """What comes before a node that is inside; the last of a value's readers to be inside lets its producer in."""
        before = [producer for value in node.inputs if value is not None and (producer := value.producer())]
        inside.update(found := [n for n in before if _passed(n, linears) and _serves_only(n, inside)])
        return found

    for _ in walk(routers, taken, limit=None):
        pass
    return inside


def _passed(node: ir.Node, linears: Mapping[ir.Node, Source]) -> bool:
    source = linears.get(node)
    blocked = source is not None and (source.routed or bool(source.uses & {"q", "k", "v", "o", "experts"}))
    return node.op_type in _PASSED and not blocked


def _serves_only(node: ir.Node, inside: set[ir.Node]) -> bool:
    """Whether all that reads the node's outputs, but for their shapes, is inside."""
    return not any(output.is_graph_output() for output in node.outputs) and all(
        reader in inside or reader.op_type in operators.SHAPE
        for output in node.outputs
        for reader in output.consumers()
    )
