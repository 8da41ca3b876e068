"""Activations by themselves: each function of a linear is a step of it, and a product keeps its factors."""

from __future__ import annotations

import math

import pytest
from stated import held, reason

from rewriter.rules.blocks.contents import Features


def steps(body):
    """The functions of each factor of ``y``, a function of the linear ``h``."""
    content = held(f"h = MatMul (x, gate) {body}")
    return [factor.steps for factor in content.factors] if isinstance(content, Features) else None


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = Sigmoid (h)", ("sigmoid",)),
        ("y = Relu (h)", ("relu",)),
        ('y = Gelu <approximate = "tanh"> (h)', ("gelu",)),
        ("y = Gelu (h)", ("Gelu(erf)",)),
        ("y = com.microsoft.FastGelu (h)", ("gelu",)),
        ("y = Neg (h)", ("scale", -1.0)),
        ("y = Mul (c2, h)", ("scale", 2.0)),
        ("y = Div (h, c2)", ("scale", 0.5)),
        ("y = Add (h, c1)", ("add", 1.0)),
        ("y = Sub (h, c1)", ("add", -1.0)),
        ("y = Min (h, c7)", ("clip", -math.inf, 7.0)),
        ("y = Max (h, c0)", ("clip", 0.0, math.inf)),
        ("y = Clip (h, c0, c7)", ("clip", 0.0, 7.0)),
        ("e = Clip (h, c0, c7) y = Min (e, c2)", ("clip", 0.0, 2.0)),
        ("n = Neg (h) e = Exp (n) s = Add (e, c1) y = Reciprocal (s)", ("sigmoid",)),
    ],
)
def test_one_function(body, expected):
    assert steps(body) == [(expected,)]


@pytest.mark.parametrize(
    "body",
    [
        "s = Sigmoid (h) y = Mul (h, s)",
        "s = Sigmoid (h) y = Mul (s, h)",
        "y = com.microsoft.QuickGelu <alpha = 1.0> (h)",
        "n = Neg (h) e = Exp (n) s = Add (e, c1) q = Div (c1, s) y = Mul (q, h)",
        "n = Neg (h) e = Exp (n) s = Add (e, c1) y = Div (h, s)",
    ],
)
def test_silu_is_the_linear_times_its_sigmoid(body):
    assert sorted(steps(body)) == [(), (("sigmoid",),)]


def test_quick_gelu_scales_before_the_sigmoid():
    assert steps("y = com.microsoft.QuickGelu <alpha = 2.0> (h)") == [(), (("scale", 2.0), ("sigmoid",))]


def test_a_power_repeats_its_factor():
    assert steps("s = Relu (h) y = Pow (s, c2)") == [(("relu",),)] * 2
    assert steps("y = Pow (h, c3)") == [()] * 3
    assert steps("y = Pow (h, half)") is None


def test_the_inside_of_gelu_is_a_cubic():
    assert steps("e = Pow (h, c3) f = Mul (e, half) y = Add (h, f)") == [(("cubic", 0.5),)]


def test_what_is_none():
    assert steps("y = Div (h, c0)") is None
    assert steps("y = Sub (c1, h)") is None
    assert steps("e = Exp (h) s = Add (e, c1) y = Reciprocal (s)") is None  # of -h it is a sigmoid
    assert held("y = Relu (x)") is None
    assert reason("h = MatMul (x, gate) y = Clip (h, b)") == "a bound of Clip is not constant"
