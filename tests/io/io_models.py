"""A small model, its files, and what is asked of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from rewriter import io
from rewriter.errors import ModelError
from rewriter.graph.contents import stored_tensors

MODELS = Path(__file__).parents[1] / "models"


def linear(*weights: onnx.TensorProto, extra: int = 0) -> onnx.ModelProto:
    """y = x @ w + b, with ``extra`` 4 KB initializers that nothing reads."""
    initializers = list(weights) or [
        numpy_helper.from_array(np.arange(64 * 32, dtype=np.float32).reshape(64, 32), "w"),
        numpy_helper.from_array(np.ones(32, np.float32), "b"),
    ]
    initializers += [numpy_helper.from_array(np.full(1024, i, np.float32), f"e{i}") for i in range(extra)]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Add", ["h", "b"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 32])],
        initializers,
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])


def external(directory: Path, location: str = "w.data", *, size: int | None = None, **info: object) -> Path:
    """Writes a model whose ``w`` is external data of ``size`` bytes (8192 are right)."""
    directory.mkdir(parents=True, exist_ok=True)
    proto = linear()
    raw = proto.graph.initializer[0].raw_data
    proto.graph.initializer[0].ClearField("raw_data")
    proto.graph.initializer[0].data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": 0, "length": len(raw), **info}.items():
        if value is not None:
            proto.graph.initializer[0].external_data.add(key=key, value=str(value))
    if size != 0:
        (directory / "w.data").write_bytes(raw[:size])
    (directory / "model.onnx").write_bytes(proto.SerializeToString())
    return directory / "model.onnx"


def fails(path: Path | str, *words: str, kind: type[Exception] = ModelError) -> str:
    with pytest.raises(kind) as caught:
        io.load(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def content(model: ir.Model) -> list[tuple[str, bytes]]:
    return [(slot.label, slot.tensor.tobytes()) for slot in stored_tensors(model)]


def files(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


def lazy(name: str, shape: tuple[int, ...], make: object) -> ir.Value:
    tensor = ir.LazyTensor(make, ir.DataType.FLOAT, ir.Shape(shape), name=name)  # type: ignore[arg-type]
    return ir.Value(name=name, const_value=tensor, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
