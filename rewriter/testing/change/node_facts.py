"""Changes of nodes: of an attribute, of which input is which, and of the operator."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import onnx_ir as ir

from rewriter.testing.change.bodies import Bodies, Place, neighbours, node_label
from rewriter.testing.change.legal import Plain, defaults, is_optional_input, is_required, others, plain

_SIBLINGS = (
    ("Add", "Sub", "Mul", "Div", "Max"),
    ("Sigmoid", "Tanh", "Relu", "Softplus", "HardSigmoid", "Neg"),
    ("Softmax", "LogSoftmax", "Hardmax"),
    ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceL1"),
    ("Gelu", "Mish", "Elu"),
    ("Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual"),
    ("And", "Or", "Xor"),
    ("Sqrt", "Exp", "Log", "Reciprocal"),
    ("Floor", "Ceil", "Round"),
)


def attribute_changed(bodies: Bodies) -> Iterator[Place]:
    """An attribute says something else that is legal."""
    for node in _not_constant(bodies):
        for attribute in node.attributes.values():
            value = plain(attribute)
            for other in () if value is None else others(node, attribute.name, value):
                change = f"{attribute.name} {_shown(value)} -> {_shown(other)}"
                yield Place(f"{node_label(node)}: {change}", partial(_set, node, attribute.name, other))


def attribute_removed(bodies: Bodies) -> Iterator[Place]:
    """An optional attribute is absent, so that its default holds."""
    for node in _not_constant(bodies):
        for name, attribute in node.attributes.items():
            if plain(attribute) is not None and not is_required(node, name, bodies.version(node)):
                yield Place(f"{node_label(node)}: {name} removed", partial(node.attributes.pop, name))


def attribute_added(bodies: Bodies) -> Iterator[Place]:
    """An optional attribute that was absent says other than its default."""
    for node in _not_constant(bodies):
        for name, default in defaults(node, bodies.version(node)).items():
            for other in others(node, name, default):
                yield Place(f"{node_label(node)}: {name} {_shown(other)} added", partial(_set, node, name, other))


def inputs_swapped(bodies: Bodies) -> Iterator[Place]:
    """Two inputs of a node stand in each other's place."""
    for node in bodies.nodes:
        for i, j in itertools.combinations(range(len(node.inputs)), 2):
            if node.inputs[i] is not node.inputs[j] and _same_type(node.inputs[i], node.inputs[j]):
                yield Place(f"{node_label(node)}: inputs {i} and {j} swapped", partial(_exchange, node, i, node, j))


def input_dropped(bodies: Bodies) -> Iterator[Place]:
    """An optional input is absent."""
    for node in bodies.nodes:
        for index, value in enumerate(node.inputs):
            if value is not None and is_optional_input(node, index, bodies.version(node)):
                yield Place(f"{node_label(node)}: input {index} ('{value.name}') dropped", partial(_drop, node, index))


def inputs_exchanged(bodies: Bodies) -> Iterator[Place]:
    """Two nodes of one operator, as of two experts, read each other's input."""
    for first, second in neighbours(bodies.nodes, lambda node: (node.op_identifier(), id(node.graph))):
        for i, (one, other) in enumerate(zip(first.inputs, second.inputs, strict=False)):
            if one is not other and _same_type(one, other):
                what = f"{node_label(first)} and {node_label(second)}: input {i} exchanged"
                yield Place(what, partial(_exchange, first, i, second, i))


def operator_replaced(bodies: Bodies) -> Iterator[Place]:
    """An operator is another one that takes the same inputs."""
    for node in bodies.nodes:
        for group in _SIBLINGS if node.domain == "" else ():
            for other in group if node.op_type in group else ():
                if other != node.op_type:
                    yield Place(f"{node_label(node)}: {other} in its place", partial(_rename, node, other))


def _not_constant(bodies: Bodies) -> Iterator[ir.Node]:
    """What a Constant node holds is a constant's fact."""
    return (node for node in bodies.nodes if node.op_type != "Constant")


def _shown(value: Plain | None) -> str:
    return f"'{value}'" if isinstance(value, str) else str(value)


def _set(node: ir.Node, name: str, value: Plain) -> None:
    node.attributes[name] = ir.convenience.convert_attribute(name, value)


def _exchange(first: ir.Node, i: int, second: ir.Node, j: int) -> None:
    one, other = first.inputs[i], second.inputs[j]
    first.replace_input_with(i, other)
    second.replace_input_with(j, one)


def _drop(node: ir.Node, index: int) -> None:
    node.replace_input_with(index, None)
    while node.inputs and node.inputs[-1] is None:
        node.resize_inputs(len(node.inputs) - 1)


def _rename(node: ir.Node, op_type: str) -> None:
    node.op_type = op_type


def _same_type(one: ir.Value | None, other: ir.Value | None) -> bool:
    """Whether two values may be of one element type: one that is not known may."""
    if one is None or other is None:
        return False
    return one.dtype is None or other.dtype is None or one.dtype == other.dtype
