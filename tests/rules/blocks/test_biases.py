"""Biases by themselves: of one linear, of all experts' linears, of the chosen one's."""

from __future__ import annotations

import pytest
from stated import CHOICE, STACKED, held

from rewriter.rules.blocks.contents import Features, Output


def bias(body):
    """The bias of the linear, or of the expert, that ``y`` is; None without one or where ``y`` is neither."""
    content = held(body)
    if isinstance(content, Output):
        return content.bias
    return content.factors[0].linear.bias if isinstance(content, Features) else None


@pytest.mark.parametrize("body", ["y = Add (h, bias)", "y = Add (bias, h)"])
def test_a_constant_on_the_features_is_a_bias(body):
    assert bias(f"h = MatMul (x, gate) {body}").shape == (6,)


def test_of_all_experts():
    assert bias("h = MatMul (x, gates) y = Add (h, biases)").shape == (4, 6)
    assert bias("h = MatMul (x, gates) y = Add (h, bias)").strides == (0, 1)  # one for all of them


def test_of_the_chosen_experts():
    chosen = f"{CHOICE} w = Gather (gates, i) u = Unsqueeze (x, axes) m = MatMul (u, w) h = Squeeze (m, third)"
    chosen = chosen.replace("u = ", "axes = Constant <value_ints = [1, 2]> () u = ")
    assert bias(f"{chosen} g = Gather (rows, i) y = Add (h, g)").shape == (4, 6)
    other = "q, j = TopK (r, k) g = Gather (rows, j) y = Add (h, g)"
    assert bias(f"{chosen} {other}") is None


def test_of_an_experts_output():
    assert bias(f"{STACKED} w = Gather (wide, zero) y = Add (o, w)").shape == (4, 8)
    assert bias(
        "h = MatMul (x, gate) a = Relu (h) o = MatMul (a, down) s = Gather (wide, zero) y = Add (o, s)"
    ).shape == (8,)


def test_what_is_no_bias():
    assert held("h = MatMul (x, gate) a = Relu (h) y = Add (a, bias)") is None  # behind the activation
    assert held("h = MatMul (x, gate) a = Add (h, bias) y = Add (a, bias)") is None  # there is one
    assert held("h = MatMul (x, gate) n = Cast <to = 7> (bias) m = Cast <to = 1> (b) y = Add (h, m)") is None
