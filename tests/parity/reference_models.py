"""One-node models of the contrib operators, run by the reference and by ONNX Runtime's CPU provider."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

from rewriter.operators.qmoe import RAW
from rewriter.operators.reference import REFERENCE_OPERATORS
from rewriter.quantize.types import QuantizedWeight

TOLERANCE = {"float32": 1e-5, "float16": 1e-3}


def node_model(operator, slots, feeds, attributes, *, metadata=None):
    """``slots`` is {name: array or None}, in the operator's order; those in ``feeds`` are graph inputs."""
    names = list(slots)
    while slots[names[-1]] is None:
        names.pop()
    used = {name: slots[name] for name in names if slots[name] is not None}
    node = helper.make_node(
        operator, [name if name in used else "" for name in names], ["y"], domain="com.microsoft", **attributes
    )
    for key, value in (metadata or {}).items():
        node.metadata_props.add(key=key, value=value)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(n, _element(used[n]), used[n].shape) for n in feeds],
        [helper.make_tensor_value_info("y", _element(used.get("scales", used[names[0]])), None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in used.items() if name not in feeds],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def reference(operator, slots, feeds, attributes, *, metadata=None):
    model = node_model(operator, slots, feeds, attributes, metadata=metadata)
    return ReferenceEvaluator(model, new_ops=list(REFERENCE_OPERATORS)).run(None, {n: slots[n] for n in feeds})[0]


def runtime(operator, slots, feeds, attributes):
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    model = node_model(operator, slots, feeds, attributes).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(None, {n: slots[n] for n in feeds})[0]


def relative_error(actual, expected):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    return np.abs(actual - expected).max() / np.abs(expected).max()


def assert_agree(operator, slots, feeds, attributes):
    """Holds reference and runtime to the tolerance of x's dtype."""
    ours = reference(operator, slots, feeds, attributes)
    theirs = runtime(operator, slots, feeds, attributes)
    assert relative_error(theirs, ours) < TOLERANCE[ours.dtype.name]


def random_moe(*, experts=8, hidden=64, inter=96, lead=(5,), bias=True, gated=False, fc3=False, dtype=np.float32):
    """Slots of an MoE; fc1 holds gate and linear when ``gated``."""
    rng = np.random.default_rng(0)

    def normal(*shape, scale=0.5):
        return (rng.standard_normal(shape) * scale).astype(dtype)

    wide = 2 * inter if gated else inter
    return {
        "x": normal(*lead, hidden),
        "router": normal(int(np.prod(lead)), experts, scale=2.0),
        "fc1": normal(experts, wide, hidden),
        "fc1_bias": normal(experts, wide) if bias else None,
        "fc2": normal(experts, hidden, inter),
        "fc2_bias": normal(experts, hidden) if bias else None,
        "fc3": normal(experts, inter, hidden) if fc3 else None,
        "fc3_bias": normal(experts, inter) if fc3 and bias else None,
    }


def random_projection(n, k, bits, block, *, symmetric, dtype, seed):
    rng = np.random.default_rng(seed)
    blocks = k // block if block else 1
    signs = np.where(rng.random((n, blocks)) < 0.5, -1, 1)
    return QuantizedWeight(
        rng.integers(0, 1 << bits, (n, k), dtype=np.uint8),
        (rng.uniform(0.5, 1.5, (n, blocks)) * signs / (6 << bits)).astype(dtype),
        None if symmetric else rng.integers(0, 1 << bits, (n, blocks), dtype=np.uint8),
        bits,
        block,
    )


def quantized(moe, bits, block, *, symmetric=True, layout=RAW, narrow=None):
    """Returns QMoE's slots with random codes in place of the floats of ``moe``, and the MoE of their values in float32.

    ``narrow`` are other bits for fc2.
    """
    dtype = moe["x"].dtype
    slots = {name: moe[name] for name in ("x", "router")}
    floats, zeros = dict(moe), {}
    for index, name in enumerate(("fc1", "fc2", "fc3")):
        slots |= {name: None, f"{name}_scales": None, f"{name}_bias": moe[f"{name}_bias"]}
        zeros[f"{name}_zeros"] = None
        if moe[name] is None:
            continue
        experts, n, k = moe[name].shape
        own_bits = narrow if narrow and name == "fc2" else bits
        weights = [
            random_projection(n, k, own_bits, block, symmetric=symmetric, dtype=dtype, seed=100 * index + e)
            for e in range(experts)
        ]
        codes, scales, *own = (
            np.stack(p) for p in zip(*(layout.require(q.shape).pack(q) for q in weights), strict=True)
        )
        slots[name], slots[f"{name}_scales"] = codes, scales
        if not symmetric:
            (zeros[f"{name}_zeros"],) = own
        floats[name] = np.stack([q.dequantize() for q in weights])
    return slots | zeros, floats


def _element(array):
    return helper.np_dtype_to_tensor_dtype(array.dtype)
