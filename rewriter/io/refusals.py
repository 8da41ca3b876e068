"""Checks each part of an ONNX message, and refuses what onnx-ir would drop or read as something else."""

from __future__ import annotations

import math

import onnx
import onnx_ir as ir

from rewriter.errors import ModelError


def check_graph(graph: onnx.GraphProto) -> None:
    """Refuses what no graph may hold, in the graph and in all that stands within it."""
    require_text("the graph", graph.name)
    for value in (*graph.input, *graph.output, *graph.value_info):
        check_value(value)
    if graph.sparse_initializer:
        raise ModelError("sparse initializers are not supported; export the model with dense ones")
    names: set[str] = set()
    for tensor in graph.initializer:
        if tensor.name in names:
            raise ModelError(f"two initializers are named '{tensor.name}'; export the model again")
        names.add(tensor.name)
        _check_data(tensor)
    for node in graph.node:
        check_node(node)


def check_function(function: onnx.FunctionProto) -> None:
    """Refuses outputs that no node defines, and what no node may hold."""
    defined = {*function.input, *(name for node in function.node for name in node.output)}
    for name in function.output:
        if name not in defined:
            raise ModelError(
                f"output '{name}' of function {function.domain}::{function.name} is defined by no node;"
                " export the model again"
            )
    for node in function.node:
        check_node(node)


def require_text(what: str, *names: object) -> None:
    """Refuses names that are not UTF-8, which protobuf gives as bytes."""
    try:
        "".join(names)  # type: ignore[arg-type]
    except TypeError:
        wrong = next(name for name in names if not isinstance(name, str))
        message = f"{what} has a name that is not text ({wrong!r}); download or export the model again"
        raise ModelError(message) from None


def check_value(value: onnx.ValueInfoProto) -> None:
    """Refuses a declared shape that no array can have; a negative size, as some exporters write, is an unknown one."""
    require_text("a graph input, output or value", value.name)
    if not value.type.HasField("tensor_type"):
        return
    dimensions = value.type.tensor_type.shape.dim
    for dimension in dimensions:
        require_text(f"a dimension of '{value.name}'", dimension.dim_param)
        if dimension.dim_value < 0:
            dimension.ClearField("dim_value")
    size = math.prod(d.dim_value for d in dimensions if d.dim_value)
    if len(dimensions) > _MOST_DIMENSIONS or size > _MOST_ELEMENTS:
        raise ModelError(
            f"'{value.name}' is declared with {len(dimensions):,} dimensions and {size:.3g} elements, which no array"
            " has; export the model with names for sizes that vary"
        )


_MOST_DIMENSIONS = 64
_MOST_ELEMENTS = 1 << 48


def check_node(node: onnx.NodeProto) -> None:
    """Refuses names that are not text, and attributes that onnx-ir would not read."""
    _require_names(node)
    for attribute in node.attribute:
        _check_attribute(node, attribute)


def _require_names(node: onnx.NodeProto) -> None:
    try:
        "".join((node.op_type, node.name, node.domain, *node.input, *node.output))
    except TypeError:
        if not isinstance(node.op_type, str):
            raise ModelError(
                f"node '{node.name}' has an operator type that is not text; download or export the model again"
            ) from None
        require_text(f"a node ({node.op_type})", node.name, node.domain, *node.input, *node.output)


def _check_attribute(node: onnx.NodeProto, attribute: onnx.AttributeProto) -> None:
    """Refuses an attribute that onnx-ir would not read, or read as something else."""
    require_text(f"an attribute of node '{node.name}'", attribute.name, attribute.ref_attr_name)
    if attribute.ref_attr_name:
        return
    if attribute.type == onnx.AttributeProto.UNDEFINED:
        raise ModelError(
            f"attribute '{attribute.name}' of node '{node.name}' ({node.op_type}) says no type; export the model again"
        )
    if attribute.type == onnx.AttributeProto.SPARSE_TENSOR:
        raise ModelError(
            f"attribute '{attribute.name}' of node '{node.name}' ({node.op_type}) is sparse, which is not supported;"
            " export the model with dense tensors"
        )
    if attribute.type == onnx.AttributeProto.TENSOR:
        _check_data(attribute.t)
    elif attribute.type == onnx.AttributeProto.GRAPH:
        check_graph(attribute.g)
    for graph in attribute.graphs:
        check_graph(graph)


def _check_data(tensor: onnx.TensorProto) -> None:
    """Refuses data of another length than the shape's, and a location in a file that makes no sense."""
    dtype = ir.DataType(tensor.data_type)
    require_text("a tensor", tensor.name)
    if min(tensor.dims, default=0) < 0 or len(tensor.dims) > _MOST_DIMENSIONS:
        raise ModelError(
            f"tensor '{tensor.name}' has the shape {list(tensor.dims[:8])}, which no array has; export the model again"
        )
    if dtype == ir.DataType.UNDEFINED:
        raise ModelError(f"tensor '{tensor.name}' has no element type; export the model again")
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        if dtype == ir.DataType.STRING:
            raise ModelError(f"tensor '{tensor.name}': strings cannot be external data; export the model again")
        for entry in tensor.external_data:
            if entry.key == "location" and "\0" in entry.value:
                raise ModelError(
                    f"tensor '{tensor.name}': its external data '{entry.value}' has a NUL in its name; export the model"
                    " again"
                )
            if entry.key in ("offset", "length") and not entry.value.isdecimal():
                raise ModelError(
                    f"tensor '{tensor.name}': the {entry.key} '{entry.value}' of its external data is not a count of"
                    " bytes; export the model again"
                )
        return
    size = math.prod(tensor.dims)
    if tensor.HasField("raw_data"):
        needed, given, what = -(-size * dtype.bitwidth // 8), len(tensor.raw_data), "bytes"
    else:
        wanted = _FIELDS.get(dtype, "int32_data")
        for field in _TYPED:
            if field != wanted and len(getattr(tensor, field)):
                raise ModelError(
                    f"tensor '{tensor.name}' of type {dtype.name} has its elements in {field}, where {wanted} holds"
                    " them; export the model again"
                )
        needed, given, what = _entries(size, dtype), len(getattr(tensor, wanted)), "entries"
    if needed != given:
        raise ModelError(
            f"tensor '{tensor.name}' of shape {list(tensor.dims)} takes {needed:,} {what} and has {given:,};"
            " export the model again"
        )


_TYPED = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")
"""Fields of a tensor that hold its elements where ``raw_data`` does not."""


_FIELDS = {
    ir.DataType.FLOAT: "float_data",
    ir.DataType.COMPLEX64: "float_data",
    ir.DataType.STRING: "string_data",
    ir.DataType.INT64: "int64_data",
    ir.DataType.DOUBLE: "double_data",
    ir.DataType.COMPLEX128: "double_data",
    ir.DataType.UINT32: "uint64_data",
    ir.DataType.UINT64: "uint64_data",
}
"""Which of them, by type; ``int32_data`` for any other."""


def _entries(size: int, dtype: ir.DataType) -> int:
    """Entries of a typed field that ``size`` elements take: 2 and 4 bits lie packed in bytes, complex ones in two."""
    if dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
        return 2 * size
    packed = dtype != ir.DataType.STRING and dtype.bitwidth in (2, 4)
    return -(-size * dtype.bitwidth // 8) if packed else size
