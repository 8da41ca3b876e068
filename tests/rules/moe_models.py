"""Models of one MoE, and what a rewritten one must compute."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

import rewriter
from rewriter.operators.activation import activation_of
from rewriter.operators.qmoe import LAYOUT_KEY, layout_named
from rewriter.parity.runtime import OrtRuntime, ReferenceRuntime
from rewriter.quantize.types import QuantizedShape

T, E, H, I = 6, 8, 64, 64  # noqa: E741
ELEMENT = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(ml_dtypes.bfloat16): TensorProto.BFLOAT16,
}
NORMALISE = ["moe-drop-zero-biases", "swiglu-interleave", "moe-fuse-fc3"]
SWIGLU = {"activation_type": "swiglu", "activation_alpha": 1.702, "activation_beta": 1.0, "swiglu_limit": 1.5}
INTERLEAVED = SWIGLU | {"swiglu_fusion": 1, "k": 2, "normalize_routing_weights": 1}


def moe_model(
    attributes,
    *,
    bias="random",
    fc3=False,
    dtype=np.float32,
    hidden=H,
    inter=I,
    experts=E,
    seed=0,
    nodes=1,
    shared=False,
):
    """One MoE (or several in a row) with random weights; ``bias`` is none, zero or random."""
    rng = np.random.default_rng(seed)
    fused = 2 if activation_of(attributes["activation_type"]).gated and attributes.get("swiglu_fusion") else 1
    element = ELEMENT[np.dtype(dtype)]
    initializers, graph_nodes, x = {}, [], "x"
    for index in range(nodes):
        prefix = "" if shared else f"layer{index}."
        arrays = {
            "fc1": rng.standard_normal((experts, fused * inter, hidden)) * 0.3,
            "fc1_bias": rng.standard_normal((experts, fused * inter)),
            "fc2": rng.standard_normal((experts, hidden, inter)) * 0.3,
            "fc2_bias": rng.standard_normal((experts, hidden)),
            "fc3": rng.standard_normal((experts, inter, hidden)) * 0.3,
            "fc3_bias": rng.standard_normal((experts, inter)),
        }
        inputs = [x, "router"]
        for name, array in arrays.items():
            if (name.startswith("fc3") and not fc3) or (name.endswith("bias") and bias == "none"):
                inputs.append("")
                continue
            zero = name.endswith("bias") and bias == "zero"
            initializers.setdefault(prefix + name, (array * (not zero)).astype(dtype))
            inputs.append(prefix + name)
        y = "y" if index == nodes - 1 else f"y{index}"
        node = helper.make_node("MoE", inputs, [y], name=f"moe{index}", domain="com.microsoft", **attributes)
        graph_nodes.append(node)
        x = y
    graph = helper.make_graph(
        graph_nodes,
        "g",
        [
            helper.make_tensor_value_info("x", element, ["T", hidden]),
            helper.make_tensor_value_info("router", element, ["T", experts]),
        ],
        [helper.make_tensor_value_info("y", element, ["T", hidden])],
        [tensor(array, name) for name, array in initializers.items()],
    )
    return make_model(graph)


def make_model(graph):
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def tensor(array, name):
    return onnx.helper.make_tensor(name, ELEMENT[array.dtype], array.shape, array.tobytes(), raw=True)


def feeds(dtype=np.float32, *, hidden=H, experts=E, tokens=T):
    rng = np.random.default_rng(7)
    return {
        "x": rng.standard_normal((tokens, hidden)).astype(dtype),
        "router": (2 * rng.standard_normal((tokens, experts))).astype(dtype),
    }


def rule_set(*phases, **default):
    """A rule set of one phase for each list of rules, where kernels may round; ``default`` is the plan's."""
    return {
        "description": "A test.",
        "rounded_activations": True,
        "phases": [{"name": f"phase{i}", "rules": list(rules)} for i, rules in enumerate(phases)],
        "quantization": {"default": default},
    }


MOE = rule_set(["moe-to-qmoe"], bits=4)


def rewrite(model, rules, target="auto", **options):
    return rewriter.apply(model, rules=rules, target=target, **options)


def nodes_of(model, op_type):
    return [node for node in model.graph.node if node.op_type == op_type]


def attributes_of(node):
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def initializers_of(model):
    arrays = {}
    for init in model.graph.initializer:
        array = onnx.numpy_helper.to_array(init)
        arrays[init.name] = array
    return arrays


def dequantized(model, node):
    """fc1, fc2 and fc3 [E, N, K] as the bytes of a QMoE say, or None."""
    arrays, own = initializers_of(model), attributes_of(node)
    stamps = {p.key: p.value for p in node.metadata_props}
    layout = layout_named(stamps[LAYOUT_KEY])
    fused = 2 if activation_of(own["activation_type"].decode()).gated and own.get("swiglu_fusion") else 1
    names = [*node.input, *[""] * 21]
    hidden, wide = arrays[names[6]].shape[1], arrays[names[3]].shape[1]
    sizes = [(wide, hidden), (hidden, wide // fused), (wide, hidden)]
    found = []
    for i, (n, k) in enumerate(sizes):
        codes, scales, zeros = names[2 + 3 * i], names[3 + 3 * i], names[11 + i]
        if not codes:
            found.append(None)
            continue
        if own.get("quant_type", b"int") != b"int":
            units = arrays[names[15 + i]]
            found.append(four_bit_floats(arrays[codes], arrays[scales], units, columns=layout.name == "columns"))
            continue
        experts = []
        stored = layout.require(QuantizedShape(n, k, own["expert_weight_bits"], own.get("block_size", 0), not zeros))
        parts = [arrays[name] for name in (codes, scales, zeros) if name]
        for e in range(arrays[codes].shape[0]):
            experts.append(stored.unpack([part[e] for part in parts]).dequantize())
        found.append(np.stack(experts))
    return found


def four_bit_floats(packed, scales, units, *, columns):
    """A stack [E, N, K] in mxfp4 or nvfp4, from its bytes: two outputs in a byte by columns, else two inputs."""
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], -1)
    codes = codes.swapaxes(1, 2) if columns else codes
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)[codes & 7]
    wide = np.repeat(scales.astype(np.float32), codes.shape[-1] // scales.shape[-1], axis=-1)
    return np.where(codes & 8, -magnitudes, magnitudes) * wide * units[:, None, None]


def with_weights(model, fc1, fc2, fc3=None):
    """The MoE model in float32 with other weights."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    node = nodes_of(copy, "MoE")[0]
    replaced = {node.input[2]: fc1, node.input[4]: fc2}
    if fc3 is not None:
        replaced[node.input[6]] = fc3
    arrays = initializers_of(model) | replaced
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(tensor(np.asarray(a).astype(np.float32), name) for name, a in arrays.items())
    for value in (*copy.graph.input, *copy.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    return copy


def halves_apart(fc1):
    """Interleaved rows to gate and linear."""
    return fc1[:, 0::2], fc1[:, 1::2]


def relative(actual, expected):
    actual, expected = np.asarray(actual).astype(np.float64), np.asarray(expected).astype(np.float64)
    assert actual.shape == expected.shape
    return np.abs(actual - expected).max() / np.abs(expected).max()


def reference(model, inputs):
    return ReferenceRuntime().run(model, inputs)["y"]


def ort(model, inputs):
    return OrtRuntime().run(model, inputs)["y"]


def assert_declines(model, rules, reason, target="cpu@1.31"):
    result = rewrite(model, rules, target)
    reasons = [d.reason for d in result.report.declines]
    assert any(reason in r for r in reasons), reasons
    assert result.model.graph.SerializeToString(deterministic=True) == untouched(model)


def untouched(model):
    return ir.to_proto(ir.from_proto(model)).graph.SerializeToString(deterministic=True)
