"""Reads the nodes of a main graph from their messages in one walk; onnx-ir takes two, and reads many fields twice."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import onnx
import onnx_ir as ir

from rewriter.errors import ModelError
from rewriter.io.refusals import check_attribute, require_names

_BODIES = frozenset({onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS})

_SHARED = frozenset({onnx.AttributeProto.INT, onnx.AttributeProto.INTS, onnx.AttributeProto.FLOAT})
"""Types of attributes of which thousands of nodes have the same: one is made for all of them."""


def are_flat(nodes: Sequence[onnx.NodeProto]) -> bool:
    """Whether no node holds a body, which sees the values around it, or is placed on a device."""
    kinds = {attribute.type for node in nodes for attribute in node.attribute}
    return kinds.isdisjoint(_BODIES) and not any(node.device_configurations for node in nodes)


def add_nodes(graph: ir.Graph, nodes: Sequence[onnx.NodeProto]) -> dict[str, ir.Value]:
    """Adds nodes to a graph that has its inputs and initializers, and no nodes yet.

    Args:
        graph: changed in place.
        nodes: flat ones.

    Returns:
        The values of the graph by name; those that are read and not defined are among them.

    Raises:
        ModelError: a value is defined twice, a name is not text, or an attribute is none that is read.
    """
    values = {value.name: value for value in (*graph.inputs, *graph.initializers.values()) if value.name}
    attributes: dict[bytes, ir.Attr] = {}

    def attribute_of(node: onnx.NodeProto, proto: onnx.AttributeProto) -> ir.Attr:
        key = proto.SerializeToString() if proto.type in _SHARED else None
        found = None if key is None else attributes.get(key)
        if found is None:
            check_attribute(node, proto)
            found = ir.serde.deserialize_attribute(proto)
            if key is not None:
                attributes[key] = found
        return found

    made: list[ir.Node] = []
    for node in nodes:
        inputs, outputs = [*node.input], [*node.output]
        require_names(node, inputs, outputs)
        read: list[ir.Value | None] = []
        for name in inputs:
            value = values.get(name) if name else None
            if value is None and name:
                value = values[name] = ir.Value(name=name)
            read.append(value)
        given: list[ir.Value] = []
        for name in outputs:
            value = values.get(name)
            if value is None or not name:
                value = ir.Value(name=name)
                if name:
                    values[name] = value
            elif value.producer() is not None or value.is_graph_input() or value.is_initializer() or value in given:
                raise ModelError(f"node '{node.name}' ({node.op_type}) defines '{name}' a second time; export it again")
            given.append(value)
        made.append(
            ir.Node(
                node.domain,
                sys.intern(node.op_type),  # which is looked up in tables again and again
                read,
                [attribute_of(node, attribute) for attribute in node.attribute],
                overload=node.overload,
                outputs=given,
                name=node.name,
                doc_string=node.doc_string or None,
                metadata_props={entry.key: entry.value for entry in node.metadata_props} or None,
            )
        )
    graph.extend(made)
    return values
