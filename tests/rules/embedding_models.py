"""Graphs with tables and stacks that are looked up at run time, and how a rewrite is held against its original."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

from rewriter.quantize import ALGORITHMS, WeightContext, WeightSpec

MODELS = Path(__file__).parents[1] / "models"


def graph_of(text: str, weights: dict[str, np.ndarray], opset: int = 21) -> onnx.ModelProto:
    """A model from the textual form of a graph; ``weights`` become its initializers."""
    header = f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>'
    model = onnx.parser.parse_model(f"{header}\n{text}")
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    return model


def exported(name: str) -> onnx.ModelProto:
    return onnx.load(MODELS / f"{name}.onnx")


def recorded(name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Inputs of an exported model, and what the runtime returned for them."""
    with np.load(MODELS / f"{name}.npz") as stored:
        named = {key.partition(":")[::2]: stored[key] for key in stored}
    return tuple({name: value for (kind, name), value in named.items() if kind == k} for k in ("in", "out"))


def normal(*shape: int, seed: int = 0, dtype=np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32).astype(dtype)


def histogram(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def nodes(model: onnx.ModelProto) -> list:
    """What the nodes of the graph compute; equal for untouched graphs."""
    graph = model.graph.node
    return [(n.op_type, [*n.input], [*n.output], [a.SerializeToString() for a in n.attribute]) for n in graph]


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def quantized(weight: np.ndarray, **spec) -> np.ndarray:
    """What a [.., N, K] float weight becomes, each matrix by itself, as float."""
    context = WeightContext(WeightSpec(**spec), weight.dtype)
    quantize = ALGORITHMS[context.spec.algorithm]
    matrices = weight.reshape(-1, *weight.shape[-2:])
    return np.stack([quantize(m, context).dequantize() for m in matrices]).reshape(weight.shape).astype(weight.dtype)


def with_weights(model: onnx.ModelProto, change: dict[str, np.ndarray]) -> onnx.ModelProto:
    """The model with other contents in some initializers."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for tensor in result.graph.initializer:
        if tensor.name in change:
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(change[tensor.name]), tensor.name))
    return result


def initializer(model: onnx.ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name))


def assert_close(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray], tolerance: float = 1e-5) -> None:
    assert got.keys() == wanted.keys()
    for name, expected in wanted.items():
        scale = max(float(np.abs(expected.astype(np.float64)).max(initial=0.0)), 1e-30)
        worst = float(np.abs(got[name].astype(np.float64) - expected.astype(np.float64)).max(initial=0.0))
        assert worst <= tolerance * scale, f"{name}: {worst / scale}"


def rule_set(*rules, phases=None, parity="all", **quantization) -> dict:
    """One phase of rules, each rewrite proved, quantized as the default says."""
    document = {"phases": phases or [{"name": "test", "rules": list(rules)}], "parity": {"local": parity}}
    plan = {key: quantization.pop(key) for key in ("include", "exclude", "overrides") if key in quantization}
    return document | {"quantization": {"default": quantization, **plan}}
