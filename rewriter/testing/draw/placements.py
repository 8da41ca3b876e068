"""Where a body may stand: in the main graph, in the bodies of If, Loop and Scan, in a function, or nested in those."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

from rewriter.testing.draw.graph import Scope, floats
from rewriter.testing.draw.spellings import unsqueeze

Body = Callable[[Scope, str], str]
"""Writes a body that reads an input [T, K]; returns its output."""

PLACEMENTS = ("main", "if", "loop", "scan", "function", "loop-if", "function-if")


def place(body: Body, placement: str, dtype: str, *, captures: bool) -> Body:
    """Returns the body wrapped as ``placement`` says.

    Args:
        body: what is wrapped.
        placement: one of ``PLACEMENTS``.
        dtype: of the body's input and outputs.
        captures: whether the constants of subgraphs are those of the graph around them.
    """
    for wrapper in reversed(placement.split("-")):
        if wrapper != "main":
            body = partial(_WRAPPERS[wrapper], body, dtype, captures)
    return body


def outer_shape(placement: str) -> list[int | str]:
    """Returns the dimensions that the placement puts before those of the body's output."""
    return [_EXTENTS[wrapper] for wrapper in placement.split("-") if wrapper in _EXTENTS]


def finish(
    scope: Scope,
    output: str,
    dtype: str,
    shape: Sequence[int | str],
    *,
    overridable: tuple[str, ...] = (),
    typed: bool = True,
    named: bool = True,
) -> ir.Model:
    """Returns the model whose main graph is ``scope``.

    Args:
        scope: the finished body; its inputs are in ``scope.inputs``.
        output: what the body computes.
        dtype: of the output.
        shape: of the output.
        overridable: initializers that are graph inputs too.
        typed: whether values carry their types and shapes, as ONNX's shape inference finds them.
        named: whether nodes have names.
    """
    inputs = list(scope.inputs.values())
    for name in overridable:
        tensor = scope.initializers[name]
        inputs.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
    outputs = [floats(output, dtype, shape), *scope.outputs]
    declared = [value for value in scope.declared if value.name not in {out.name for out in outputs}]
    weights = list(scope.initializers.values())
    graph = helper.make_graph(scope.nodes, "moe", inputs, outputs, weights, value_info=declared)
    proto = helper.make_model(graph, opset_imports=scope.opsets(), functions=scope.functions, ir_version=10)
    for body in (proto.graph, *proto.functions) if not named else ():
        _forget_names(body.node)
    proto = onnx.shape_inference.infer_shapes(proto)
    ranked = [value for value in proto.graph.output if value.type.tensor_type.HasField("shape")]
    del proto.graph.output[:]
    proto.graph.output.extend(ranked)  # the checker wants a rank of every output
    if not typed:
        _forget_types(proto.graph)
    return ir.from_proto(proto)


def _if(body: Body, dtype: str, captures: bool, scope: Scope, x: str) -> str:
    scope.inputs["cond"] = helper.make_tensor_value_info("cond", TensorProto.BOOL, [])
    branches = [scope.child(captures=captures) for _ in range(2)]  # both have the same names to choose from
    outputs = [body(inner, x) for inner in branches]
    for inner in branches:
        inner.outputs.clear()
    first, second = (
        scope.close(inner, [], [floats(name, dtype)]) for inner, name in zip(branches, outputs, strict=True)
    )
    return scope.op("If", "cond", then_branch=first, else_branch=second)


def _loop(body: Body, dtype: str, captures: bool, scope: Scope, x: str) -> str:
    trips = scope.constant("trips", np.array(_TRIPS, dtype=np.int64))
    always = scope.constant("always", np.array(True))
    inner = scope.child(captures=captures)
    inputs = [
        helper.make_tensor_value_info("step", TensorProto.INT64, []),
        helper.make_tensor_value_info("go", TensorProto.BOOL, []),
        floats("state", dtype),
    ]
    output = body(inner, "state")
    going = helper.make_tensor_value_info(inner.op("Identity", "go"), TensorProto.BOOL, [])
    kept = inner.op("Identity", "state")
    graph = scope.close(inner, inputs, [going, floats(kept, dtype), floats(output, dtype)])
    _, result, *more = scope.ops("Loop", trips, always, x, count=2 + len(inner.outputs), body=graph)
    for name in more:
        scope.expose(name, dtype)
    return result


def _scan(body: Body, dtype: str, captures: bool, scope: Scope, x: str) -> str:
    rows = unsqueeze(scope, x, (0,))
    inner = scope.child(captures=captures)
    output = body(inner, "row")
    graph = scope.close(inner, [floats("row", dtype)], [floats(output, dtype)])
    count = 1 + len(inner.outputs)
    result, *more = scope.ops("Scan", rows, count=count, body=graph, num_scan_inputs=1)
    for name in more:
        scope.expose(name, dtype)
    return result


def _function(body: Body, dtype: str, captures: bool, scope: Scope, x: str) -> str:
    inner = Scope(scope.opset, inline=True, operands=scope.operands)
    output = body(inner, "x")
    names = [output, *(value.name for value in inner.outputs)]
    function = helper.make_function("local", "Experts", ["x", *inner.inputs], names, inner.nodes, inner.opsets())
    scope.functions.append(function)
    scope.domains |= {"local", *inner.domains}
    scope.inputs.update(inner.inputs)
    result, *more = scope.ops("Experts", x, *inner.inputs, count=len(names), domain="local")
    for name in more:
        scope.expose(name, dtype)
    return result


def _forget_types(graph: onnx.GraphProto) -> None:
    del graph.value_info[:]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _forget_types(attribute.g)


def _forget_names(nodes: Iterable[onnx.NodeProto]) -> None:
    for node in nodes:
        node.name = ""
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _forget_names(attribute.g.node)


_TRIPS = 2
_EXTENTS = {"loop": _TRIPS, "scan": 1}
_WRAPPERS = {"if": _if, "loop": _loop, "scan": _scan, "function": _function}
