"""The order in which nodes are visited: a graph's own, bodies where their node stands."""

from __future__ import annotations

from collections.abc import Container, Iterator

import onnx_ir as ir

from rewriter.graph.contents import subgraphs


def visits(graph: ir.Graph | ir.Function, bodiless: Container[str]) -> Iterator[tuple[ir.Node, bool]]:
    """Every node in order with False; one with bodies again with True, after the nodes of its bodies.

    Args:
        graph: where to start.
        bodiless: operator types that hold no graphs, so that their attributes need not be read.
    """
    for node in graph:
        yield node, False
        bodies = [] if node.op_type in bodiless or not node.attributes.data else subgraphs(node)
        for body in bodies:
            yield from visits(body, bodiless)
        if bodies:
            yield node, True
