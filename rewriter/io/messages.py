"""Reads a model from an ONNX message, and refuses what onnx-ir would drop or read as something else."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveInitializersFromInputsPass

from rewriter.errors import ModelError, root_cause, warn
from rewriter.io.reading import is_whole
from rewriter.io.refusals import check_function, check_graph, check_value, require_text


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
        check_graph(proto.graph)
        for function in proto.functions:
            check_function(function)
        model: ir.Model = ir.from_proto(proto)
        _declare(model.graph, declared)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"the model is invalid: {root_cause(error)}") from error
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
    require_text("a value", *(info.name for info in declared))
    types: dict[bytes, ir.TypeProtocol | None] = {}
    shapes: dict[bytes, ir.Shape | None] = {}
    for info in declared:
        value = values.get(info.name)
        if value is None:
            continue
        key = info.type.SerializeToString()
        if key not in types:
            check_value(info)
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
