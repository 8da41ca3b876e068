"""Linears by themselves: tokens or activated features times the weight of one expert, of all, or of the chosen one."""

from __future__ import annotations

import pytest
from stated import CHOICE, PLAIN, STACKED, held, kinds, reason, stated

from rewriter.rules.blocks.contents import Dense, Features, Output, Packed, Router

NBITS = "com.microsoft.MatMulNBits <K = 8, N = 6, bits = 4, block_size = 16{more}> (x, codes, scales)"


def linear(body):
    content = held(body)
    assert isinstance(content, Features)
    return content.factors[0].linear


@pytest.mark.parametrize(
    "body",
    [
        "y = MatMul (x, gate)",
        "y = Gemm (x, gate, bias)",
        "y = Gemm <transB = 1> (x, down)",
        'y = Einsum <equation = "th,hi->ti"> (x, gate)',
        'y = Einsum <equation = "hi,th->ti"> (gate, x)',
    ],
)
def test_of_one_expert(body):
    found = linear(body)
    assert (found.by, found.weight.sizes, found.x.name) == ("one", (6, 8), "x")
    assert (found.bias is not None) == ("bias" in body)


@pytest.mark.parametrize("body", ["y = MatMul (x, gates)", 'y = Einsum <equation = "th,ehi->eti"> (x, gates)'])
def test_of_all_experts(body):
    found = linear(body)
    assert (found.by, found.weight.sizes, found.weight.stack_size) == ("all", (6, 8), 4)
    assert kinds(body) == [("expert",), ("token",), ("feature",)]


def test_of_the_chosen_experts():
    axes = "axes = Constant <value_ints = [1, 2]> ()"
    found = linear(f"{CHOICE} {axes} w = Gather (gates, i) u = Unsqueeze (x, axes) y = MatMul (u, w)")
    assert isinstance(found.by, Router) and found.weight.sizes == (6, 8)
    body = f'{CHOICE} w = Gather (gates, i) y = Einsum <equation = "th,tkhi->tki"> (x, w)'
    assert isinstance(linear(body).by, Router)
    assert kinds(body) == [("token",), ("slot",), ("feature",)]


def test_of_quantized_weights():
    found = linear(f"y = {NBITS.format(more='')}")
    assert isinstance(found.weight, Packed) and found.weight.sizes == (6, 8)
    assert (
        reason(f"y = {NBITS.format(more=', weight_prepacked = 1')}") == "the codes are reordered (g_idx) or prepacked"
    )


@pytest.mark.parametrize(("body", "by"), [(PLAIN, "one"), (STACKED, "all")])
def test_of_activated_features_is_an_output(body, by):
    content = held(f"{body} y = Identity (o)")
    assert isinstance(content, Output) and isinstance(content.down, Dense)
    assert (content.by, content.down.sizes, content.up, content.activation.kind.name) == (by, (8, 6), None, "relu")


def test_near_misses():
    assert reason("y = Gemm <alpha = 2.0> (x, gate)") == "alpha or beta of Gemm is not 1"
    assert stated("y = MatMul (x, r)") is None  # no constant
    assert stated('y = Einsum <equation = "th,hi->t"> (x, gate)') is None
    mixed = "g = MatMul (x, gates) h = MatMul (x, up) m = Mul (g, h) y = MatMul (m, downs)"
    assert reason(mixed) == "the projections of an expert are not those of one expert"
    assert "MoE has no activation" in reason("h = MatMul (x, gate) a = Tanh (h) y = MatMul (a, down)")
