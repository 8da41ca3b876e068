"""Small linear maps, and what their quantized form must compute."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from support import run

import rewriter
from rewriter.operators.matmul_nbits import RAW
from rewriter.quantize.types import QuantizedShape


def weights(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32).astype(dtype)


def linear_model(body, initializers, *, x=("T", 40), dtype="float", outputs="y", inputs="", opset=21):
    """A model of the nodes in ``body``; ``initializers`` is name -> array."""
    dims = ",".join(str(d) for d in x)
    types = {name: ir.DataType.from_numpy(a.dtype).name.lower() for name, a in initializers.items()}
    declared = ", ".join(f"{types[name]}[{','.join(map(str, a.shape))}] {name}" for name, a in initializers.items())
    outs = ", ".join(f"{dtype}{name}" if "[" in name else f"{dtype}[] {name}" for name in outputs.split())
    header = f'<ir_version: 10, opset_import: ["" : {opset}]>'
    text = f"{header}\ng ({dtype}[{dims}] x{inputs}) => ({outs}) <{declared}> {{ {body} }}"
    model = ir.from_onnx_text(text, initializers=[ir.tensor(a, name=name) for name, a in initializers.items()])
    for value in model.graph.outputs:
        value.shape = None  # inference finds it
    return ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model)))


def quantized(model, rules, *, quantizer=None, **overrides):
    overrides = {"parity.local": "all", **{key.replace("__", "."): value for key, value in overrides.items()}}
    return rewriter.apply(model, rules, quantizer=quantizer, overrides=overrides)


def dequantized(node):
    """The [N, K] weight that a MatMulNBits reads, from its bytes."""
    attributes = {a.name: a.value for a in node.attributes.values()}
    arrays = [v.const_value.numpy() for v in node.inputs[1:4] if v is not None]
    n, k, bits, block = (attributes[name] for name in ("N", "K", "bits", "block_size"))
    return RAW.require(QuantizedShape(n, k, bits, block, len(arrays) < 3)).unpack(arrays).dequantize()


def agrees(result, expected, feeds, *, tolerance=1e-5):
    """Asserts that ONNX Runtime computes with the rewritten model what NumPy says is ``expected``."""
    (actual,) = run(result.model, feeds).values()
    assert actual.shape == expected.shape and actual.dtype == feeds["x"].dtype
    difference = np.abs(actual.astype(np.float64) - expected)
    assert difference.max() <= tolerance * np.abs(expected).max()


def nodes(model, op_type):
    return [node for node in model.graph.all_nodes() if node.op_type == op_type]
