"""Layers along the residual stream, and what belongs to which."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from role_graphs import Build, H, V, logits_of

from rewriter.roles import Role


def test_decoder_layers():
    b = Build()
    h = b.op("Gather", b.weight(V, H), b.ids)
    for layer in range(3):
        h = b.op("Add", h, b.attention(f"a{layer}", b.norm(h)))
        h = b.op("Add", h, b.mlp(f"m{layer}", b.norm(h)) if layer == 0 else b.experts(b.norm(h), f"e{layer}."))
    roles = b.roles(logits_of(b, b.norm(h)))
    for layer in range(3):
        assert [roles[f"a{layer}.{x}"] for x in "qkvo"] == [Role(f"attention.{x}", layer) for x in "qkvo"]
    assert [roles[f"m0.{x}"] for x in "gud"] == [Role(f"mlp.{x}", 0) for x in ("gate", "up", "down")]
    assert roles["e1..r"] == Role("router", 1)
    assert [roles[f"e2.3.{x}"] for x in "gud"] == [Role(f"expert.{x}", 2, 3) for x in ("gate", "up", "down")]
    assert roles["head"] == Role("lm_head")


def test_feed_forward_without_attention_opens_layers():
    b = Build()
    h = b.op("Add", b.x, b.experts(b.x, "a"))
    h = b.op("Add", h, b.experts(b.norm(h), "b"))
    roles = b.roles(b.op("Add", h, b.attention("c", h)))
    assert (roles["a.r"].layer, roles["b.r"].layer, roles["c.q"].layer) == (0, 1, 2)


def test_parallel_attention_and_mlp_share_a_layer():
    b = Build()
    h = b.x
    for layer in range(2):
        x = b.norm(h)
        h = b.op("Add", h, b.op("Add", b.mlp(f"m{layer}", x), b.attention(f"a{layer}", x)))
    roles = b.roles(h)
    assert [roles[key].layer for key in ("m0.d", "a0.o", "m1.d", "a1.o")] == [0, 0, 1, 1]
    assert roles["m1.g"].name == "mlp.gate"


def test_cross_attention_stays_in_its_layer():
    b = Build()
    h, encoded = b.x, b.input(ir.DataType.FLOAT)
    for layer in range(2):
        h = b.op("Add", h, b.attention(f"s{layer}", h))
        k, v = b.linear(f"k{layer}", encoded, H), b.linear(f"v{layer}", encoded, H)
        y = b.op("MultiHeadAttention", b.linear(f"q{layer}", h, H), k, v, domain="com.microsoft")
        h = b.op("Add", h, b.linear(f"o{layer}", y, H))
        h = b.op("Add", h, b.mlp(f"m{layer}", h))
    roles = b.roles(h)
    assert roles["k1"] == Role("attention.k", 1)
    assert [roles[key].layer for key in ("s0.q", "q0", "o0", "m0.d", "s1.q", "o1", "m1.d")] == [0, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_shared_expert(gated, first):
    b = Build()
    h = b.op("Add", b.x, b.attention("a", b.x))
    x = b.norm(h)
    shared = b.mlp("s", x)
    if gated:
        shared = b.op("Mul", b.op("Sigmoid", b.linear("sr", x, 1)), shared)
    routed = b.experts(x)
    total = b.op("Add", b.op("Add", h, shared), routed) if first else b.op("Add", h, b.op("Add", routed, shared))
    roles = b.roles(total)
    assert [roles[f"s.{x}"] for x in "gud"] == [Role(f"shared_expert.{x}", 0) for x in ("gate", "up", "down")]
    assert roles.get("sr") == (Role("shared_expert.router", 0) if gated else None)
    assert roles["e0.d"] == Role("expert.down", 0, 0)


def test_gated_add_of_a_shared_expert():
    b = Build()
    gate = b.op("Sigmoid", b.linear("sr", b.x, 1))
    names = b.names(b.op("GatedAdd", b.experts(b.x), b.mlp("s", b.x), gate, domain="com.microsoft"))
    assert (names["s.u"], names["sr"], names["e1.u"]) == ("shared_expert.up", "shared_expert.router", "expert.up")


def test_dense_layer_beside_routed_layers_is_no_shared_expert():
    b = Build()
    h = b.op("Add", b.x, b.mlp("m", b.norm(b.x)))
    assert b.names(b.op("Add", h, b.experts(b.norm(h))))["m.d"] == "mlp.down"
