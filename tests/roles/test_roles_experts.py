"""Routed experts by how they are dispatched and combined; tables and heads."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from role_graphs import Build, E, H, I, V, logits_of

from rewriter.roles import Role


def test_stack_alone_makes_experts():
    b = Build()
    stack, total = b.weight(3, H, H), None
    for expert in range(3):
        w = b.op("Squeeze", b.op("Slice", stack, *(b.constant([n]) for n in (expert, expert + 1, 0))), b.constant([0]))
        y = b.op("MatMul", b.x, w)
        b.labels[str(expert)] = y.producer()
        y = b.op("Unheard", y, domain="my")
        total = y if total is None else b.op("Add", total, y)
    assert b.roles(total)["2"] == Role("expert.gate_up", 0, 2)


def test_combine_by_where():
    b = Build()
    _, ids = b.route(b.x)
    mask = b.op("Equal", ids, b.constant(3))
    roles = b.roles(b.op("Where", mask, b.mlp("e", b.x), b.constant(0.0, np.float32)))
    assert roles["e.d"] == Role("expert.down", 0, 3)
    assert roles["e.g"] == Role("expert.gate", 0, 3)


def test_dispatch_and_combine_by_einsum():
    b = Build()
    _, ids = b.route(b.x)
    onehot = b.op("OneHot", ids, b.constant(E), b.constant([0, 1]))
    x = b.op("Einsum", onehot, b.x, equation="tke,th->eth")
    up = b.op("Einsum", x, b.weight(E, H, I), equation="eth,ehi->eti")
    b.labels["u"] = up.producer()
    down = b.op("Einsum", b.op("Relu", up), b.weight(E, I, H), equation="eti,eih->eth")
    b.labels["d"] = down.producer()
    names = b.names(b.op("Einsum", down, onehot, equation="eth,tke->th"))
    assert names == {"r": "router", "u": "expert.up", "d": "expert.down"}


def test_weights_applied_to_the_input():
    b = Build()
    weights, ids = b.route(b.x)
    x = b.op("Mul", b.x, b.expert_weight(weights, ids, 1))
    assert b.roles(b.mlp("e", x))["e.d"] == Role("expert.down", 0, 1)


def test_column_of_dense_weights_names_the_expert():
    b = Build()
    weights, ids = b.route(b.x)
    dense = b.op("ScatterElements", b.constant(np.zeros((3, E)), np.float32), ids, weights, axis=1)
    column = b.op("Gather", dense, b.constant([2]), axis=1)
    assert b.roles(b.op("Mul", b.mlp("e", b.x), column))["e.u"] == Role("expert.up", 0, 2)


def test_slot_of_the_top_k_names_no_expert():
    b = Build()
    weights, _ = b.route(b.x)
    slot = b.op("Gather", weights, b.constant([1]), axis=1)
    assert b.roles(b.op("Mul", b.mlp("e", b.x), slot))["e.u"] == Role("expert.up", 0, None)


def test_quantized_stack_gathered_at_run_time():
    b = Build()
    _, ids = b.route(b.x)
    codes = b.constant(np.zeros((E, I, H)), np.uint8)
    w = b.op("GatherBlockQuantized", codes, ids, b.weight(E, I, 1), domain="com.microsoft")
    b.labels["gather"] = w.producer()
    up = b.op("MatMul", w, b.op("Unsqueeze", b.x, b.constant([-1])))
    b.labels["u"] = up.producer()
    names = b.names(b.op("Add", b.x, b.linear("d", b.op("Relu", up), H, I)))
    assert names == {"r": "router", "gather": "expert.up", "u": "expert.up", "d": "expert.down"}


def test_three_dimensional_quantized_embedding():
    b = Build()
    codes = b.constant(np.zeros((V, 1, H)), np.uint8)
    h = b.op("GatherBlockQuantized", codes, b.ids, b.weight(V, 1, 1), domain="com.microsoft")
    b.labels["embed"] = h.producer()
    h = b.op("Reshape", h, b.constant([0, 0, H]))
    assert b.names(b.op("Add", h, b.mlp("m", b.norm(h))))["embed"] == "embedding"


def test_second_table_of_the_same_ids_is_an_embedding():
    b = Build()
    h, extra = (b.op("Gather", b.weight(V, H), b.ids) for _ in range(2))
    b.labels["extra"] = extra.producer()
    h = b.op("Add", h, b.mlp("m", h))
    gated = b.op("Mul", b.op("Gelu", b.linear("gate", h, H)), extra)
    roles = b.roles(b.op("Add", h, b.linear("project", gated, H)))
    assert roles["extra"] == Role("embedding")
    assert "gate" not in roles
    assert "project" not in roles


def test_sampling_from_the_logits_makes_no_router():
    b = Build()
    h = b.op("Gather", b.weight(V, H), b.ids)
    h = b.op("Add", h, b.mlp("m", h))
    logits = logits_of(b, h)
    _, token = b.op("TopK", logits, b.constant([1]), outputs=2)
    assert b.names(logits, token)["head"] == "lm_head"


def test_router_logits_as_graph_output():
    b = Build()
    h = b.op("Add", b.x, b.experts(b.x))
    scores = b.labels["e.r"].outputs[0]
    scores.shape, scores.dtype = ir.Shape(["t", E]), ir.DataType.FLOAT
    names = b.names(logits_of(b, h), scores)
    assert (names["e.r"], names["head"]) == ("router", "lm_head")


@pytest.mark.parametrize("op_type", ["MatMul", "Gemm", "MatMulNBits"])
def test_a_head_whose_width_has_only_a_name(op_type):
    def head(width):
        b = Build()
        weight = b.weight(width, H) if op_type == "Gemm" else b.weight(H, width)
        attributes = {"Gemm": {"transB": 1}, "MatMulNBits": {"K": H, "N": width}}.get(op_type, {})
        logits = b.op(op_type, b.x, weight, domain="com.microsoft" if op_type == "MatMulNBits" else "", **attributes)
        logits.shape, logits.dtype = ir.Shape(["t", "v"]), ir.DataType.FLOAT
        b.labels["head"] = logits.producer()
        return b.names(logits)

    assert head(V) == {"head": "lm_head"}
    assert head(2) == {}


def test_softcapped_head_and_narrow_head():
    b = Build()
    capped = b.op("Mul", b.op("Tanh", b.linear("head", b.x, V)), b.constant(30.0, np.float32))
    capped.shape, capped.dtype = ir.Shape(["t", V]), ir.DataType.FLOAT
    assert b.names(capped) == {"head": "lm_head"}
    b = Build()
    narrow = b.linear("classes", b.x, 2)
    narrow.shape, narrow.dtype = ir.Shape(["t", 2]), ir.DataType.FLOAT
    assert b.names(narrow) == {}


def from_the_back(b, stack, expert):
    end = 2**63 - 1 if expert == 2 else expert - 2
    return b.op("Squeeze", b.op("Slice", stack, b.constant([expert - 3]), b.constant([end])), b.constant([0]))


def by_tuple(b, stack, expert):
    return b.op("GatherND", stack, b.constant([expert]))


def by_sum(b, stack, expert):
    return b.op("Gather", stack, b.op("Add", b.constant(expert - 1), b.constant(1)))


@pytest.mark.parametrize("pick", [from_the_back, by_tuple, by_sum])
def test_slices_are_read_as_they_are_for_constants(pick):
    b = Build()
    stack, total = b.weight(3, H, H), b.x
    for expert in range(3):
        y = b.op("MatMul", b.x, pick(b, stack, expert))
        b.labels[str(expert)] = y.producer()
        total = b.op("Add", total, b.op("Unheard", y, domain="my"))
    roles = b.roles(total)
    assert [roles[str(expert)].expert for expert in range(3)] == [0, 1, 2]
