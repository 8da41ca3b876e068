"""Constants: values that no caller can change."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from rewriter.tensors.view import View


def constant(value: ir.Value) -> View | None:
    """Returns the whole-tensor view of a value that no caller can change, else None.

    An initializer counts unless it is also a graph input (a caller may override it); so does a Constant node.
    """
    if value.is_graph_input():
        return None
    tensor = value.const_value
    if tensor is None:
        producer = value.producer()
        if producer is None or (producer.domain, producer.op_type) != ("", "Constant"):
            return None
        tensor = _held(producer)
    elif not (value.is_initializer() or value.producer() is not None):
        return None
    return None if tensor is None or tensor.dtype == ir.DataType.STRING else View.whole(tensor, value.name or "")


def _held(node: ir.Node) -> ir.TensorProtocol | None:
    """The tensor of a Constant node; onnx-ir's own helper renames it, and it may be shared with the given model."""
    for name, attribute in node.attributes.items():
        if attribute.is_ref():
            return None
        if attribute.type == ir.AttributeType.TENSOR:
            return attribute.as_tensor()
        if name in _HELD:
            return ir.tensor(np.array(attribute.value, dtype=_HELD[name]), name=node.outputs[0].name)
    return None


_HELD = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32}
