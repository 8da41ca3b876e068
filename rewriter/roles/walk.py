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
    stack: list[Iterator[tuple[ir.Node, bool]]] = [((node, False) for node in graph)]
    while stack:
        for node, done in stack[-1]:
            yield node, done
            bodies = subgraphs(node) if not done and node.op_type not in bodiless else []
            if bodies:
                stack.append(iter([(node, True)]))
                stack.extend(((inner, False) for inner in body) for body in reversed(bodies))
                break
        else:
            stack.pop()
