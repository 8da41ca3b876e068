"""Which activation of MoE a product of functions is."""

from __future__ import annotations

import pytest
from stated import held, reason

TWO = "g = MatMul (x, gate) u = MatMul (x, up)"


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ("a = Relu (g)", "relu"),
        ('a = Gelu <approximate = "tanh"> (g)', "gelu"),
        ("s = Sigmoid (g) a = Mul (g, s)", "silu"),
        ("s = Sigmoid (g) t = Mul (g, s) a = Mul (t, u)", "swiglu"),
        ("s = Sigmoid (g) t = Mul (u, s) a = Mul (t, g)", "swiglu"),
        ("s = Relu (g) a = Mul (s, s)", "relu2"),
        ('s = Gelu <approximate = "tanh"> (g) a = Mul (s, u)', "geglu"),
        ("a = Identity (g)", "identity"),
    ],
)
def test_named(body, name):
    content = held(f"{TWO} {body} y = MatMul (a, down)")
    assert content.activation.kind.name == name
    assert (content.up is not None) == (name in ("swiglu", "geglu"))


def test_the_clamped_swiglu_of_gpt_oss():
    gate = "l = Min (g, c7) q = Mul (l, c2) s = Sigmoid (q) t = Mul (l, s)"
    linear = "m = Clip (u, minus, c7) n = Add (m, c1)"
    found = held(f"{TWO} {gate} {linear} a = Mul (t, n) y = MatMul (a, down)").activation
    assert (found.kind.name, found.alpha, found.beta, found.limit) == ("swiglu", 2.0, 1.0, 7.0)


@pytest.mark.parametrize(
    "body",
    [
        "a = Gelu (g)",  # by erf
        "a = Tanh (g)",
        "s = Sigmoid (g) t = Mul (g, s) n = Add (u, c1) m = Relu (n) a = Mul (t, m)",
        "s = Sigmoid (g) t = Mul (g, s) a = Mul (t, c2)",
    ],
)
def test_none_that_moe_has(body):
    assert reason(f"{TWO} {body} y = MatMul (a, down)").startswith("MoE has no activation")
