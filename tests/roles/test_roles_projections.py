"""Projections of MLPs and attention, packed, low-rank, adapted or stacked."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from role_graphs import Build, H, I, V

from rewriter.roles import Role, find_roles


@pytest.mark.parametrize("activation", ["Relu", "Gelu", "Tanh"])
def test_ungated_mlp(activation):
    b = Build()
    inner = b.op(activation, b.linear("u", b.x, I))
    assert b.names(b.op("Add", b.x, b.linear("d", inner, H, I))) == {"u": "mlp.up", "d": "mlp.down"}


def test_packed_mlp_and_erf_gelu():
    b = Build()
    gate, up = b.op("Split", b.linear("gu", b.x, 2 * I), outputs=2, axis=-1, num_outputs=2)
    half = b.op("Mul", gate, b.constant(0.5, np.float32))
    inner = b.op("Mul", half, b.op("Add", b.op("Erf", gate), b.constant(1.0, np.float32)))
    names = b.names(b.op("Add", b.x, b.linear("d", b.op("Mul", up, inner), H, I)))
    assert names == {"gu": "mlp.gate_up", "d": "mlp.down"}


def test_decomposed_attention_with_rotary_and_cache():
    b = Build()
    h = b.op("Gather", b.weight(V, H), b.ids)
    positions = b.op("Range", b.constant(0), b.op("Shape", b.ids), b.constant(1))
    cos, sin = (b.op("Gather", b.weight(64, H), positions) for _ in range(2))
    x = b.norm(h)
    heads = []
    for letter in "qk":
        y = b.norm(b.op("Reshape", b.linear(letter, x, H), b.constant([0, 0, 2, 4])))
        low, high = b.op("Split", y, outputs=2, axis=-1, num_outputs=2)
        turned = b.op("Concat", b.op("Neg", high), low, axis=-1)
        heads.append(b.op("Add", b.op("Mul", y, cos), b.op("Mul", turned, sin)))
    past = b.input(ir.DataType.FLOAT)
    key = b.op("Concat", past, heads[1], axis=1)
    scores = b.op("MatMul", heads[0], b.op("Transpose", key, perm=[0, 1, 3, 2]))
    scores = b.op("Softmax", b.op("Add", b.op("Tanh", scores), b.input(ir.DataType.FLOAT)))
    mixed = b.op("MatMul", scores, b.linear("v", x, H))
    h = b.op("Add", h, b.linear("o", b.op("Reshape", mixed, b.constant([0, -1, H])), H))
    model = b.model(h, key)
    roles = find_roles(model)
    assert {label: roles[node].name for label, node in b.labels.items()} == {x: f"attention.{x}" for x in "qkvo"}
    assert [role.name for node, role in roles.items() if node.op_type == "Gather"] == ["embedding"]


def test_low_rank_projections_are_attention():
    b = Build()
    q = b.linear("q_b", b.norm(b.linear("q_a", b.x, 4)), H, 4)
    latent = b.linear("kv_a", b.x, 6)
    content, rope = b.op("Split", latent, outputs=2, axis=-1, num_outputs=2)
    k, v = b.op("Split", b.linear("kv_b", b.norm(content), 2 * H, 3), outputs=2, axis=-1, num_outputs=2)
    y = b.op("Attention", q, b.op("Concat", k, rope, axis=-1), v)
    names = b.names(b.op("Add", b.x, b.linear("o", y, H)))
    assert names == {
        "q_a": "attention.q",
        "q_b": "attention.q",
        "kv_a": "attention.k",
        "kv_b": "attention.kv",
        "o": "attention.o",
    }


def test_lora_adapters_take_the_role_of_what_they_adapt():
    b = Build()
    q = b.op("Add", b.linear("q", b.x, H), b.linear("B", b.linear("A", b.x, 2), H, 2))
    names = b.names(b.op("Attention", q, b.linear("k", b.x, H), b.linear("v", b.x, H)))
    assert names["A"] == names["B"] == names["q"] == "attention.q"


def test_gated_attention_output():
    b = Build()
    q, gate = b.op("Split", b.linear("q", b.x, 2 * H), outputs=2, axis=-1, num_outputs=2)
    y = b.op("Attention", q, b.linear("k", b.x, H), b.linear("v", b.x, H))
    names = b.names(b.op("Add", b.x, b.linear("o", b.op("Mul", y, b.op("Sigmoid", gate)), H)))
    assert names == {"q": "attention.q", "k": "attention.k", "v": "attention.v", "o": "attention.o"}


def test_layers_in_a_stack_are_no_experts():
    b = Build()
    stack = b.weight(2, H, I)
    h = b.x
    for layer in range(2):
        w = b.op("Gather", stack, b.constant(layer), axis=0)
        up = b.op("MatMul", h, w)
        b.labels[f"u{layer}"] = up.producer()
        h = b.op("Add", h, b.linear(f"d{layer}", b.op("Relu", up), H, I))
    assert b.roles(h)["u1"] == Role("mlp.up", 1)


def test_stacked_gate_and_up_are_no_experts():
    b = Build()
    stack = b.weight(2, H, I)
    gate, up = (b.op("MatMul", b.x, b.op("Gather", stack, b.constant(n), axis=0)) for n in range(2))
    b.labels |= {"g": gate.producer(), "u": up.producer()}
    down = b.linear("d", b.op("Mul", b.silu(gate), up), H, I)
    assert b.roles(b.op("Add", b.x, down)) == {
        "g": Role("mlp.gate", 0),
        "u": Role("mlp.up", 0),
        "d": Role("mlp.down", 0),
    }


def test_stacked_attention_projections_are_no_experts():
    b = Build()
    stack = b.weight(3, H, H)
    q, k, v = (b.op("MatMul", b.x, b.op("Gather", stack, b.constant(n), axis=0)) for n in range(3))
    b.labels["k"] = k.producer()
    assert b.roles(b.op("Attention", q, k, v))["k"] == Role("attention.k", 0)
