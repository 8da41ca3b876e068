"""A model of half floats as one of float32: the same function, without what halves round on the way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from rewriter.parity.subgraph_inputs import Feeds

Array = npt.NDArray[Any]

_HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
HALVES = frozenset({np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)})
"""The types whose results a model of many operators rounds at every one of them."""


def widened(model: onnx.ModelProto, many: Sequence[Feeds]) -> tuple[onnx.ModelProto, Sequence[Feeds]]:
    """Returns the model and what it is fed with every half as float32: inputs, outputs, constants and casts."""
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    _widen(wide.graph)
    fed = [{n: a.astype(np.float32) if a.dtype in HALVES else a for n, a in feeds.items()} for feeds in many]
    return wide, fed


def _widen(graph: onnx.GraphProto) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info):
        kind = value.type.tensor_type
        if kind.elem_type in _HALVES:
            kind.elem_type = TensorProto.FLOAT
    _widen_tensors(graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i in _HALVES:
                attribute.i = TensorProto.FLOAT
            if attribute.HasField("t"):
                _widen_tensors([attribute.t])
            if attribute.HasField("g"):
                _widen(attribute.g)


def _widen_tensors(tensors: Iterable[TensorProto]) -> None:
    for tensor in tensors:
        if tensor.data_type in _HALVES:
            array = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
