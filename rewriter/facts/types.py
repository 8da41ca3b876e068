"""Types of values that an export left out: those of parts of constants are known, the others are inferred by ONNX.

ONNX infers nothing of the operators of ONNX Runtime, nor of what follows from them: for the time of the inference
standard operators, whose outputs have the same type and shape, stand in for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import onnx
import onnx_ir as ir
from onnx import helper

from rewriter.facts.facts import Facts
from rewriter.facts.sequences import untyped_sequences
from rewriter.graph.contents import nodes_of, subgraphs
from rewriter.operators.matmul_nbits import MATMUL_NBITS
from rewriter.operators.moe import MOE
from rewriter.operators.operator import DOMAIN
from rewriter.operators.qmoe import QMOE
from rewriter.tensors import View

_AS_FIRST_INPUT = {
    **dict.fromkeys((MOE.name, QMOE.name, "RotaryEmbedding", "SimplifiedLayerNormalization"), (0,)),
    **dict.fromkeys(("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"), (0, 3)),
}
"""Operator of ONNX Runtime -> its outputs that have the type and shape of its first input."""

_SMALL = 1000
"""Bytes of a constant that inference may read, as the operand of a Reshape."""


def infer_types(model: ir.Model, known: Facts) -> None:
    """Infers the types and shapes that an export left out; ONNX is asked only where a value that is read lacks one.

    What is declared stays as it is, and what is a sequence or an optional has no tensor's type. Of an operator of ONNX
    Runtime that nothing stands in for, ONNX guesses, and is wrong of statistics: nothing is taken.

    Args:
        model: to be changed.
        known: what is known of its constants.
    """
    values = (value for node in nodes_of(model.graph) for value in node.outputs)
    lacking = [value for value in values if value.type is None or value.shape is None]
    outputs, unknown = set(model.graph.outputs), False
    for value in lacking:
        view = known.get(value, View)
        if view is not None and value not in outputs:
            _declare(value, ir.TensorType(view.dtype), ir.Shape(view.shape))
        elif value.uses():
            unknown = True
    if unknown:
        _infer(model)


def _infer(model: ir.Model) -> None:
    """Sets the types and shapes that ONNX infers."""
    nodes = list(model.graph)
    if not model.functions and not any(map(subgraphs, nodes)):
        nodes = [node for node in nodes if _is_asked_about(node)]
    message = _without_weights(model, nodes)
    known = _stand_in(message.graph, message.graph)
    try:
        inferred = onnx.shape_inference.infer_shapes(message, strict_mode=False, data_prop=True)
    except Exception:  # of whatever C++ kind: nothing is known then
        return
    kept = {*untyped_sequences(model), *model.graph.outputs}
    for own, found in zip(_graphs(nodes), _messages(inferred.graph), strict=True):
        types = {value.name: value.type for value in (*found.value_info, *found.output)}
        for node in own:
            for value in node.outputs:
                guessed = node.domain == DOMAIN and value.name not in known
                if _lacks_type(value) and value.name in types and value not in kept and not guessed:
                    declared = types[value.name]
                    shape = ir.serde.deserialize_type_proto_for_shape(declared)
                    _declare(value, ir.serde.deserialize_type_proto_for_type(declared), shape)


def _declare(value: ir.Value, type_: ir.TypeProtocol | None, shape: ir.Shape | None) -> None:
    """Sets the type and the shape where they are missing."""
    value.type = value.type or type_
    value.shape = value.shape or shape


_NO_INTEGERS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE, ir.DataType.BOOL)
"""Types of which no value is a shape or an axis."""


def _is_asked_about(node: ir.Node) -> bool:
    """Whether ONNX can say more of a node's outputs than is declared, or go by what they hold: a shape, an axis."""
    for value in node.outputs:
        dtype, shape = value.dtype, value.shape
        if dtype not in _NO_INTEGERS or shape is None:
            return True
        for dim in shape.dims:
            if isinstance(dim, ir.SymbolicDim) and dim.value is None:
                return True
    return False


def _without_weights(model: ir.Model, nodes: Sequence[ir.Node]) -> onnx.ModelProto:
    """A model of these nodes as a message in which large constants, and what other nodes make, are inputs."""
    message = onnx.ModelProto(ir_version=model.ir_version)
    message.opset_import.extend(helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items())
    message.functions.extend(map(ir.serde.serialize_function, model.functions.values()))
    graph, given = message.graph, set(model.graph.inputs)
    made = {value for node in nodes for value in node.outputs}
    graph.input.extend(map(ir.serde.serialize_value, model.graph.inputs))
    graph.output.extend(ir.serde.serialize_value(value) for value in model.graph.outputs if value in made)
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            continue
        if value not in given:
            graph.input.add().CopyFrom(helper.make_tensor_value_info(name, tensor.dtype, tensor.shape.numpy()))
        if tensor.nbytes <= _SMALL:
            graph.initializer.add().CopyFrom(ir.serde.serialize_tensor(tensor))
            graph.initializer[-1].name = name
    others = dict.fromkeys(value for node in nodes for value in node.inputs if value is not None)
    for value in others:
        if value not in made and value.producer() is not None:
            ir.serde.serialize_value_into(graph.input.add(), value)
    for node in nodes:
        ir.serde.serialize_node_into(graph.node.add(), node)
        for value in node.outputs:
            if value.name and value.type is not None:
                ir.serde.serialize_value_into(graph.value_info.add(), value)
    return message


def _stand_in(graph: onnx.GraphProto, whole: onnx.GraphProto) -> set[str]:
    """Adds standard operators beside those of ONNX Runtime, to infer from; returns the outputs that have one."""
    known: set[str] = set()
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        for body in _bodies(node):
            known |= _stand_in(body, whole)
        nodes.append(node)
        if node.domain != DOMAIN or not node.input:
            continue
        made: dict[int, onnx.NodeProto] = {}
        if node.op_type == MATMUL_NBITS.name:
            sizes = {a.name: a.i for a in node.attribute}
            weight = f"{node.output[0]}__weight"
            shape = [sizes.get(name, 0) for name in "KN"]
            whole.input.add().CopyFrom(helper.make_tensor_value_info(weight, onnx.TensorProto.FLOAT, shape))
            made[0] = helper.make_node("MatMul", [node.input[0], weight], [])
        else:
            for index in _AS_FIRST_INPUT.get(node.op_type, ()):
                if index < len(node.output) and node.output[index]:
                    made[index] = helper.make_node("Identity", node.input[:1], [])
        for index, other in made.items():
            known.add(node.output[index])
            other.output.append(node.output[index])
            node.output[index] += "__unknown"
            nodes.append(other)
    if len(nodes) > len(graph.node):
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(copies)
    return known


def _graphs(nodes: Iterable[ir.Node]) -> Iterator[Iterable[ir.Node]]:
    """The nodes, and those of each body that they hold."""
    yield nodes
    for node in nodes:
        for body in subgraphs(node):
            yield from _graphs(body)


def _messages(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for body in _bodies(node):
            yield from _messages(body)


def _bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.ref_attr_name:
            continue
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def _lacks_type(value: ir.Value) -> bool:
    return value.type is None or value.shape is None
