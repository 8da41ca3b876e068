"""Routers that are more than one linear, and what is beside them and is none."""

from __future__ import annotations

import numpy as np
import pytest
from role_graphs import Build, E, H, I, logits_of

from rewriter.roles import Role


def _layer_norm(b: Build, x, width: int):
    return b.op("LayerNormalization", x, b.weight(width), b.weight(width))


def _block(b: Build, x, logits):
    """The routed sum of experts that read ``x`` and are chosen by ``logits``."""
    weights, ids = b.op("TopK", b.op("Softmax", logits), b.constant([2]), outputs=2)
    total = None
    for expert in range(E):
        y = b.op("Mul", b.mlp(f"e{expert}", x), b.expert_weight(weights, ids, expert))
        total = y if total is None else b.op("Add", total, y)
    return total


def _logits_of_two_layers(b: Build, x):
    hidden = b.op("Gelu", b.linear("r1", _layer_norm(b, x, H), I))
    return hidden, b.linear("r2", hidden, E, I)


def test_hidden_layer_of_a_router_is_the_router():
    b = Build()
    h = b.op("Add", b.x, b.attention("a", b.x))
    x = b.norm(h)
    h = b.op("Add", h, _block(b, x, _logits_of_two_layers(b, x)[1]))
    roles = b.roles(b.op("Add", h, b.attention("c", h)))
    assert roles["r1"] == roles["r2"] == Role("router", 0)
    assert [roles[f"e1.{part}"] for part in "gud"] == [Role(f"expert.{part}", 0, 1) for part in ("gate", "up", "down")]
    assert roles["a.o"] == Role("attention.o", 0)
    assert roles["c.q"].layer == 1


def test_router_of_four_layers_with_a_norm_and_a_gate():
    b = Build()
    low = b.linear("r1", b.x, I)
    normed = _layer_norm(b, low, I)
    gated = b.op("Mul", b.silu(b.linear("r2", normed, I, I)), b.linear("r3", normed, I, I))
    logits = b.linear("r5", b.op("Gelu", b.linear("r4", gated, I, I)), E, I)
    roles = b.roles(b.op("Add", b.x, _block(b, b.x, logits)))
    assert [roles.get(f"r{index}") for index in range(1, 6)] == [Role("router", 0)] * 5


def test_cosine_router():
    b = Build()
    projected = b.linear("r1", b.x, I)
    length = b.op("ReduceL2", projected, b.constant([-1]), keepdims=1)
    cosines = b.linear("r2", b.op("Div", projected, b.op("Clip", length)), E, I)
    logits = b.op("Mul", cosines, b.constant(10.0, np.float32))
    names = b.names(b.op("Add", b.x, _block(b, b.x, logits)))
    assert names["r1"] == names["r2"] == "router"


def test_router_that_reads_the_hidden_layer_of_the_router_before():
    b = Build()
    h, before = b.x, None
    for layer in range(2):
        h = b.op("Add", h, b.attention(f"a{layer}", h))
        hidden = b.linear(f"d{layer}", h, I)
        hidden = hidden if before is None else b.op("Add", hidden, before)
        logits = b.linear(f"r{layer}", b.op("Gelu", b.linear(f"m{layer}", hidden, I, I)), E, I)
        weights, ids = b.op("TopK", b.op("Softmax", logits), b.constant([2]), outputs=2)
        chosen = [
            b.op("Mul", b.mlp(f"e{layer}.{expert}", h), b.expert_weight(weights, ids, expert)) for expert in range(E)
        ]
        h, before = b.op("Sum", h, *chosen), hidden
    roles = b.roles(h)
    for layer in range(2):
        assert [roles.get(f"{linear}{layer}") for linear in "dmr"] == [Role("router", layer)] * 3


@pytest.mark.parametrize("reader", ["the stream", "a linear", "the outputs", "an unknown operator"])
def test_hidden_layer_that_is_also_read_elsewhere_is_not(reader):
    b = Build()
    hidden, logits = _logits_of_two_layers(b, b.x)
    outputs = [b.op("Add", b.x, _block(b, b.x, logits))]
    if reader == "the stream":
        outputs = [b.op("Add", outputs[0], b.op("ReduceMean", hidden, b.constant([-1]), keepdims=1))]
    elif reader == "a linear":
        outputs = [b.op("Add", outputs[0], b.linear("w", hidden, H, I))]
    elif reader == "the outputs":
        outputs.append(hidden)
    else:
        outputs.append(b.op("Unknown", hidden, domain="test"))
    names = b.names(*outputs)
    assert names["r2"] == "router"
    assert names.get("r1") != "router"
    assert names.get("w") != "router"


def test_mlp_before_a_block_stays_an_mlp():
    b = Build()
    h = b.op("Add", b.x, b.mlp("m", b.x))
    shared = b.mlp("s", h)
    names = b.names(b.op("Add", h, b.op("Add", _block(b, h, _logits_of_two_layers(b, h)[1]), shared)))
    assert [names[f"m.{part}"] for part in "gud"] == ["mlp.gate", "mlp.up", "mlp.down"]
    assert [names[f"s.{part}"] for part in "gud"] == [f"shared_expert.{part}" for part in ("gate", "up", "down")]
    assert names["r1"] == "router"


def test_model_that_returns_its_likeliest_tokens_has_no_router():
    b = Build()
    logits = logits_of(b, b.norm(b.mlp("m", b.x)))
    names = b.names(*b.op("TopK", logits, b.constant([2]), outputs=2))
    assert [names[f"m.{part}"] for part in "gud"] == ["mlp.gate", "mlp.up", "mlp.down"]


def _mixture(b: Build, how: str, members: int):
    """``members`` MLPs that all run, weighed by a gate with a hidden layer."""
    scores = b.op("Softmax", b.linear("g2", b.op("Relu", b.linear("g1", b.x, I)), members, I))
    mlps = [b.mlp(f"e{index}", b.x) for index in range(members)]
    if how == "columns":
        columns = [b.op("Gather", scores, b.constant([index]), axis=-1) for index in range(members)]
        return b.op("Sum", *(b.op("Mul", column, y) for column, y in zip(columns, mlps, strict=True)))
    stack = b.op("Concat", *(b.op("Unsqueeze", y, b.constant([1])) for y in mlps), axis=1)
    if how == "einsum":
        return b.op("Einsum", scores, stack, equation="te,teh->th")
    if how == "matmul":
        rows = b.op("MatMul", b.op("Unsqueeze", scores, b.constant([1])), stack)
        return b.op("Squeeze", rows, b.constant([1]))
    return b.op("ReduceSum", b.op("Mul", b.op("Unsqueeze", scores, b.constant([-1])), stack), b.constant([1]))


@pytest.mark.parametrize("how", ["einsum", "matmul", "product", "columns"])
def test_gate_over_all_experts_is_the_router(how):
    b = Build()
    roles = b.roles(b.op("Add", b.x, _mixture(b, how, 3)))
    assert roles.get("g1") == roles.get("g2") == Role("router", 0)
    assert roles["e1.d"] == Role("mlp.down", 0)


@pytest.mark.parametrize("how", ["product", "columns"])
def test_gate_of_one_mlp_is_not(how):
    b = Build()
    names = b.names(b.op("Add", b.x, _mixture(b, how, 1)))
    assert "router" not in names.values()
