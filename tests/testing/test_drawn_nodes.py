"""The strategies of fused and quantized nodes, embeddings and attentions: each choice is drawn, and shrinks."""

from __future__ import annotations

import numpy as np
import pytest
from support import histogram
from test_strategies import drawn, smallest

from rewriter.operators.form import form_of
from rewriter.operators.matmul_nbits import RAW
from rewriter.operators.moe import MOE
from rewriter.operators.operator import input_at
from rewriter.operators.qmoe import ROUTER_WEIGHTS, quantized_of
from rewriter.quantize.types import QuantizedShape
from rewriter.testing import (
    attention_projections,
    moe_nodes,
    quantized_experts,
    quantized_projections,
    tied_embeddings,
)
from rewriter.testing.draw.attention import ATTENTION_BIASES, LINEARS, PACKINGS
from rewriter.testing.draw.embeddings import TYINGS
from rewriter.testing.draw.fused import EXPERT_BIASES, MIXINGS
from rewriter.testing.draw.moe_nodes import ACTIVATIONS, BLOCK_SIZES
from rewriter.testing.draw.packed import BITS, LAYOUTS, ZERO_POINTS

MAIN = {"placements": ["main"]}


def nodes(model, *op_types):
    return [node for node in model.graph if node.op_type in op_types]


def array(model, value):
    return model.graph.initializers[value.name].const_value.numpy()


def test_the_smallest_of_each():
    assert histogram(smallest(moe_nodes())) == {"MatMul": 1, "MoE": 1}
    assert histogram(smallest(moe_nodes(operators=["QMoE"]))) == {"MatMul": 1, "QMoE": 1}
    assert histogram(smallest(quantized_projections())) == {"MatMulNBits": 1}
    assert histogram(smallest(tied_embeddings())) == {"Gather": 1, "Add": 1, "MatMul": 1}
    assert histogram(smallest(attention_projections())) == {"MatMul": 5, "Transpose": 1, "Softmax": 1}
    assert histogram(smallest(quantized_experts()))["MatMulNBits"] == 3


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_drawn(activation):
    model = smallest(moe_nodes(activations=[activation], **MAIN))
    (node,) = nodes(model, "MoE")
    form = form_of(node)
    assert (form.activation, form.gated) == (activation.split("-")[0], activation.endswith("fc3"))
    fused = {"swiglu": 1, "geglu": 1, "swiglu-concatenated": 2, "geglu-concatenated": 2}
    assert form.fusion == fused.get(activation, 0)
    fc1, fc2 = (array(model, node.inputs[slots.weight]).shape for slots in MOE.projections[:2])
    assert fc1[1] == form.fused * fc2[2]


@pytest.mark.parametrize("biases", EXPERT_BIASES)
def test_biases_are_real_or_zero_or_absent(biases):
    model = smallest(moe_nodes(biases=[biases], **MAIN))
    (node,) = nodes(model, "MoE")
    found = [input_at(node, slots.bias) for slots in MOE.projections[:2]]
    real = [value is not None and bool(array(model, value).any()) for value in found]
    assert all((value is None) == (biases == "none") for value in found)
    assert real == [biases in ("real", "mixed"), biases == "real"]


@pytest.mark.parametrize(
    "wanted",
    [
        lambda form: form.sparse_mixer,
        lambda form: form.normalize,
        lambda form: form.k == 3,
        lambda form: (form.alpha, form.beta, form.limit) == (pytest.approx(1.702), 1, 7),
    ],
)
def test_every_kind_of_routing_and_of_swiglu_is_drawn(wanted):
    assert drawn(moe_nodes(**MAIN), lambda model: any(wanted(form_of(node)) for node in nodes(model, "MoE")))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block", BLOCK_SIZES)
def test_quantized_experts_of_every_form(bits, block):
    strategy = moe_nodes(operators=["QMoE"], bits=[bits], block_sizes=[block], layouts=["raw"], **MAIN)
    for zeros in (False, True):
        model = drawn(strategy, lambda m, wanted=zeros: quantized_of(nodes(m, "QMoE")[0]).zero_points[0] == wanted)
        held = quantized_of(nodes(model, "QMoE")[0])
        assert (held.bits[0], held.block) == (bits, block)


@pytest.mark.parametrize("mixing", MIXINGS)
def test_router_weights_are_drawn(mixing):
    def wanted(model):
        value = input_at(nodes(model, "QMoE")[0], ROUTER_WEIGHTS)
        return (value.producer().op_type.lower() if value else "none") == mixing

    assert drawn(moe_nodes(operators=["QMoE"], **MAIN), wanted)


NODE_OBSTACLES = {
    "weight-shared": lambda model: (
        len({node.inputs[2] for node in nodes(model, "MoE")}) == 1 < len(nodes(model, "MoE"))
    ),
    "weight-computed": lambda model: nodes(model, "MoE")[0].inputs[2].producer() is not None,
    "weight-also-read": lambda model: nodes(model, "ReduceMax"),
    "weight-is-input": lambda model: len(model.graph.inputs) > 1,
    "weight-is-output": lambda model: len(model.graph.outputs) > 1,
    "router-rank3": lambda model: nodes(model, "MoE")[0].inputs[1].shape.rank() == 3,
}


@pytest.mark.parametrize("obstacle", NODE_OBSTACLES)
def test_every_obstacle_of_a_node_is_drawn(obstacle):
    strategy = moe_nodes(operators=["MoE"], obstacles=[obstacle], typed=True, **MAIN)
    assert drawn(strategy, NODE_OBSTACLES[obstacle])
    assert not NODE_OBSTACLES[obstacle](smallest(moe_nodes(operators=["MoE"], obstacles=[], **MAIN)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_drawn(layout):
    def prepacked(model):
        return "weight_prepacked" in nodes(model, "MatMulNBits")[0].attributes

    def stamp(model):
        return nodes(model, "QMoE")[0].metadata_props.get("rewriter.layout")

    assert drawn(quantized_projections(layouts=[layout], **MAIN), lambda m: prepacked(m) == (layout != "raw"))
    assert drawn(moe_nodes(operators=["QMoE"], layouts=[layout], **MAIN), lambda m: stamp(m) == layout)


@pytest.mark.parametrize("zero_points", ZERO_POINTS)
def test_zero_points_in_every_form(zero_points):
    model = smallest(quantized_projections(zero_points=[zero_points], layouts=["raw"], bits=[4], **MAIN))
    (node,) = nodes(model, "MatMulNBits")
    n, k, bits, block = (node.attributes[name].as_int() for name in ("N", "K", "bits", "block_size"))
    b, scales, *zeros = (array(model, value) for value in node.inputs[1:4] if value is not None)
    assert (scales.ndim, [z.dtype for z in zeros]) == {
        "none": (2, []),
        "packed": (2, [np.uint8]),
        "flat": (1, [np.uint8]),
        "float": (2, [np.float32]),
    }[zero_points]
    if zero_points != "float":
        RAW.require(QuantizedShape(n, k, bits, block, not zeros)).unpack([b, scales, *zeros])


@pytest.mark.parametrize("tying", TYINGS)
def test_every_tying_is_drawn(tying):
    model = smallest(tied_embeddings(tyings=[tying], **MAIN))
    tables = [v.const_value.numpy() for v in model.graph.initializers.values() if v.dtype.is_floating_point()]
    if tying == "quantized":
        assert histogram(model) == {"Reshape": 1, "GatherBlockQuantized": 1, "Add": 1, "MatMulNBits": 1}
        return
    assert len(tables) == (1 if tying in ("transposed-head", "gemm-head", "transposed-embedding") else 2)
    if tying.startswith("equal") or tying == "unequal":
        assert np.array_equal(*tables) == (tying != "unequal")


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("linear", LINEARS)
def test_every_attention_is_drawn(packing, linear):
    for bias in ATTENTION_BIASES:
        model = smallest(attention_projections(packings=[packing], linears=[linear], biases=[bias], **MAIN))
        found = histogram(model)
        assert found["Split"] == (packing == "split") and found["Slice"] == 3 * (packing == "slices")
        count = 3 if packing == "separate" else 1
        op_type = {"matmul": "MatMul", "matmulnbits": "MatMulNBits"}.get(linear, "Gemm")
        assert found[op_type] == count + 2 * (linear == "matmul")
        inside = bias == "inside" and linear != "matmul"
        assert found["Add"] == (0 if bias == "none" or inside else count)
