"""Reads a model from an ONNX message, and refuses what onnx-ir would drop or read as something else."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveInitializersFromInputsPass

from rewriter.errors import ModelError, warn
from rewriter.io.reading import is_whole


def from_proto(proto: onnx.ModelProto, *, own: bool = False) -> ir.Model:
    """Returns the model of a message; unlike onnx-ir, refuses, or names, what it would drop or read otherwise.

    Args:
        proto: the message.
        own: nobody else reads the message, which need not stay whole: what it declares of values is read faster then.

    Raises:
        ModelError: no whole model, or one that is too new; names defined twice, tensors whose data do not fit their
            shape, sparse initializers, training information.
    """
    if not is_whole(proto):
        raise ModelError("the message is no whole model: it has no graph, no IR version or no opset; load it again")
    if proto.ir_version > onnx.IR_VERSION:
        raise ModelError(
            f"the model has IR version {proto.ir_version}, and the installed onnx reads up to {onnx.IR_VERSION};"
            " pip install -U onnx"
        )
    if any(not 0 < entry.version < _MOST_VERSION for entry in proto.opset_import):
        versions = ", ".join(f"{entry.domain or 'ai.onnx'} {entry.version}" for entry in proto.opset_import)
        raise ModelError(f"an opset that the model imports has no version that there is ({versions}); export it again")
    if proto.training_info:
        raise ModelError("training information is not supported; export the model for inference")
    if proto.graph.quantization_annotation:
        text = "the model's quantization annotations are left out: they name values that a rewrite may replace"
        warn(text)
    if any(node.device_configurations for node in proto.graph.node):
        text = "nodes are placed on devices (device_configurations): one that replaces others is placed on none"
        warn(text)
    # What onnx-ir logs about an invalid model, validate() says in one line.
    log = logging.getLogger("onnx_ir.serde")
    quiet = log.disabled
    log.disabled = True
    try:
        declared = list(proto.graph.value_info) if own else []
        if own:
            proto.graph.ClearField("value_info")
        _check_graph(proto.graph)
        for function in proto.functions:
            _check_function(function)
        model: ir.Model = ir.from_proto(proto)
        _declare(model.graph, declared)
    except ModelError:
        raise
    except Exception as error:
        reason: BaseException = error
        while deeper := reason.__cause__ or reason.__context__:
            reason = deeper
        raise ModelError(f"the model is invalid: {reason}") from error
    finally:
        log.disabled = quiet
    name_standard_domain(model)
    list_no_initializers(model)
    return model


_MOST_VERSION = 1 << 31


def _declare(graph: ir.Graph, declared: Sequence[onnx.ValueInfoProto]) -> None:
    """Sets the declared types of values; each distinct type is read once, since large graphs have a few dozen."""
    values = {value.name: value for node in graph for value in node.outputs if not value.is_graph_output()}
    values |= {name: value for name, value in graph.initializers.items() if not value.is_graph_input()}
    _require_text("a value", *(info.name for info in declared))
    types: dict[bytes, ir.TypeProtocol | None] = {}
    shapes: dict[bytes, ir.Shape | None] = {}
    for info in declared:
        value = values.get(info.name)
        if value is None:
            continue
        key = info.type.SerializeToString()
        if key not in types:
            _check_value(info)
            types[key] = ir.serde.deserialize_type_proto_for_type(info.type)
            shapes[key] = ir.serde.deserialize_type_proto_for_shape(info.type)
        same = types[key]
        # To set a value's dtype changes its type in place, so that its type must be its own; shapes are frozen.
        if isinstance(same, ir.TensorType) and same.denotation is None:
            value.type = ir.TensorType(same.dtype)
        else:
            value.type = ir.serde.deserialize_type_proto_for_type(info.type)
        value.shape = shapes[key]
        value.doc_string = info.doc_string or None
        if info.metadata_props:
            value.metadata_props.update({entry.key: entry.value for entry in info.metadata_props})


def name_standard_domain(model: ir.Model) -> None:
    """Imports the standard operators under the name that onnx-ir gives them on nodes, where ``ai.onnx`` is empty."""
    for imports in (model.opset_imports, *(function.opset_imports for function in model.functions.values())):
        if "ai.onnx" in imports:
            imports.setdefault("", imports.pop("ai.onnx"))


def list_no_initializers(model: ir.Model) -> None:
    """Makes a model of IR version 3, which lists every initializer among its inputs, one of 4, where that is a choice.

    No caller could override those: a runtime takes them as constants up to version 3.
    """
    if model.ir_version < _LISTS_AS_IT_LIKES:
        RemoveInitializersFromInputsPass()(model)
        model.ir_version = _LISTS_AS_IT_LIKES


_LISTS_AS_IT_LIKES = 4


def _check_graph(graph: onnx.GraphProto) -> None:
    _require_text("the graph", graph.name)
    for value in (*graph.input, *graph.output, *graph.value_info):
        _check_value(value)
    if graph.sparse_initializer:
        raise ModelError("sparse initializers are not supported; export the model with dense ones")
    names: set[str] = set()
    for tensor in graph.initializer:
        if tensor.name in names:
            raise ModelError(f"two initializers are named '{tensor.name}'; export the model again")
        names.add(tensor.name)
        _check_data(tensor)
    _check_attributes(graph.node)


def _check_function(function: onnx.FunctionProto) -> None:
    defined = {*function.input, *(name for node in function.node for name in node.output)}
    for name in function.output:
        if name not in defined:
            raise ModelError(
                f"output '{name}' of function {function.domain}::{function.name} is defined by no node;"
                " export the model again"
            )
    _check_attributes(function.node)


def _require_text(what: str, *names: object) -> None:
    """Refuses names that are not UTF-8, which protobuf gives as bytes."""
    try:
        "".join(names)  # type: ignore[arg-type]
    except TypeError:
        wrong = next(name for name in names if not isinstance(name, str))
        message = f"{what} has a name that is not text ({wrong!r}); download or export the model again"
        raise ModelError(message) from None


def _check_value(value: onnx.ValueInfoProto) -> None:
    """Refuses a declared shape that no array can have; a negative size, as some exporters write, is an unknown one."""
    _require_text("a graph input, output or value", value.name)
    if not value.type.HasField("tensor_type"):
        return
    dimensions = value.type.tensor_type.shape.dim
    for dimension in dimensions:
        _require_text(f"a dimension of '{value.name}'", dimension.dim_param)
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


def _check_attributes(nodes: Iterable[onnx.NodeProto]) -> None:
    for node in nodes:
        try:
            "".join((node.op_type, node.name, node.domain, *node.input, *node.output))
        except TypeError:
            _refuse_names(node)
        for attribute in node.attribute:
            _require_text(f"an attribute of node '{node.name}'", attribute.name, attribute.ref_attr_name)
            if attribute.ref_attr_name:
                continue
            if attribute.type == onnx.AttributeProto.UNDEFINED:
                raise ModelError(
                    f"attribute '{attribute.name}' of node '{node.name}' ({node.op_type}) says no type; export the"
                    " model again"
                )
            if attribute.type == onnx.AttributeProto.SPARSE_TENSOR:
                raise ModelError(
                    f"attribute '{attribute.name}' of node '{node.name}' ({node.op_type}) is sparse, which is not"
                    " supported; export the model with dense tensors"
                )
            if attribute.type == onnx.AttributeProto.TENSOR:
                _check_data(attribute.t)
            elif attribute.type == onnx.AttributeProto.GRAPH:
                _check_graph(attribute.g)
            for graph in attribute.graphs:
                _check_graph(graph)


def _refuse_names(node: onnx.NodeProto) -> None:
    if not isinstance(node.op_type, str):
        raise ModelError(
            f"node '{node.name}' has an operator type that is not text; download or export the model again"
        )
    _require_text(f"a node ({node.op_type})", node.name, node.domain, *node.input, *node.output)


def _check_data(tensor: onnx.TensorProto) -> None:
    """Refuses data of another length than the shape's, and a location in a file that makes no sense."""
    dtype = ir.DataType(tensor.data_type)
    _require_text("a tensor", tensor.name)
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
