"""From bytes on disk to a model: what is not ONNX, or not all of it, is refused by name."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from pathlib import Path

import onnx
import onnx_ir as ir

from rewriter.errors import ModelError


def model_file(path: Path) -> Path:
    """Returns the absolute path of the model file that ``path`` names.

    Args:
        path: a file, or a directory that holds one model.

    Raises:
        ModelError: there is none, or there are several.
    """
    if path.is_dir():
        found = sorted(path.glob("*.onnx"))
        if len(found) != 1:
            names = ", ".join(f.name for f in found)
            raise ModelError(
                f"'{path}' holds several models ({names}); name one of them"
                if found
                else f"the directory '{path}' holds no .onnx file; give the path of a model"
            )
        path = found[0]
    if not path.exists():
        raise ModelError(f"there is no file '{path}'; give the path of an .onnx model")
    return path.absolute()


def read_proto(file: Path) -> onnx.ModelProto:
    """Reads a model file, without its external data.

    Raises:
        ModelError: it cannot be read, is not ONNX, is truncated or too new.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ModelError(f"'{file}' cannot be read ({error.strerror}); give the path of an .onnx model") from error
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except Exception as error:  # protobuf's DecodeError has no public import that type checkers know
        raise ModelError(f"'{file}' is not an ONNX model, or is truncated; {_hint(data)}") from error
    if not proto.HasField("graph") or not proto.ir_version or not proto.opset_import:
        raise ModelError(f"'{file}' is not an ONNX model, or is truncated; {_hint(data)}")
    if proto.ir_version > onnx.IR_VERSION:
        raise ModelError(
            f"'{file}' has IR version {proto.ir_version}, and the installed onnx reads up to {onnx.IR_VERSION};"
            " pip install -U onnx"
        )
    return proto


def _hint(data: bytes) -> str:
    if data.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer: run git lfs pull"
    return "the file is empty" if not data else "download or export it again"


def from_proto(proto: onnx.ModelProto) -> ir.Model:
    """Returns the model of a message; unlike onnx-ir, refuses what it would drop or read as something else.

    Raises:
        ModelError: names defined twice, tensors whose bytes do not fit their shape, sparse initializers.
    """
    # What onnx-ir logs about an invalid model, validate() says in one line.
    log = logging.getLogger("onnx_ir.serde")
    quiet = log.disabled
    log.disabled = True
    try:
        _check_graph(proto.graph)
        for function in proto.functions:
            _check_function(function)
        return ir.from_proto(proto)
    except ModelError:
        raise
    except Exception as error:
        reason: BaseException = error
        while deeper := reason.__cause__ or reason.__context__:
            reason = deeper
        raise ModelError(f"the model is invalid: {' '.join(str(reason).split())}") from error
    finally:
        log.disabled = quiet


def _check_graph(graph: onnx.GraphProto) -> None:
    if graph.sparse_initializer:
        raise ModelError("sparse initializers are not supported; export the model with dense ones")
    names: set[str] = set()
    for tensor in graph.initializer:
        if tensor.name in names:
            raise ModelError(f"two initializers are named '{tensor.name}'; export the model again")
        names.add(tensor.name)
        _check_bytes(tensor)
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


def _check_attributes(nodes: Iterable[onnx.NodeProto]) -> None:
    for node in nodes:
        if not isinstance(node.op_type, str):  # protobuf gives bytes that are not UTF-8 as they are
            raise ModelError(
                f"node '{node.name}' has an operator type that is not text; download or export the model again"
            )
        for attribute in node.attribute:
            if attribute.ref_attr_name:
                continue
            if attribute.type == onnx.AttributeProto.TENSOR:
                _check_bytes(attribute.t)
            elif attribute.type == onnx.AttributeProto.GRAPH:
                _check_graph(attribute.g)
            for graph in attribute.graphs:
                _check_graph(graph)


def _check_bytes(tensor: onnx.TensorProto) -> None:
    """Refuses raw data of another length than the shape's, and a place in a file that is no place."""
    if ir.DataType(tensor.data_type) == ir.DataType.UNDEFINED:
        raise ModelError(f"tensor '{tensor.name}' has no element type; export the model again")
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        for entry in tensor.external_data:
            if entry.key in ("offset", "length") and not entry.value.isdecimal():
                raise ModelError(
                    f"tensor '{tensor.name}': the {entry.key} '{entry.value}' of its external data is not a count of"
                    " bytes; export the model again"
                )
    elif tensor.HasField("raw_data"):
        bits = math.prod(tensor.dims) * ir.DataType(tensor.data_type).bitwidth
        needed, given = -(-bits // 8), len(tensor.raw_data)
        if needed != given:
            raise ModelError(
                f"tensor '{tensor.name}' of shape {list(tensor.dims)} takes {needed:,} bytes and has {given:,};"
                " export the model again"
            )
