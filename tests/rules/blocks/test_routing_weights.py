"""The weights of the chosen by themselves: divided by their sum, bounded, scaled."""

from __future__ import annotations

import pytest
from stated import CHOICE, held, kinds

from rewriter.rules.blocks.mixing import Mixing, Total

TOTAL = f"{CHOICE} t = ReduceSum (v, last)"
EXP = "p = Exp (r) v, i = TopK (p, k) t = ReduceSum (v, last)"


def test_their_sum():
    assert isinstance(held(f"{CHOICE} y = ReduceSum (v, last)"), Total)
    assert kinds(f"{CHOICE} y = ReduceSum (v, last)") == [("token",), ()]
    assert kinds(f"{CHOICE} y = ReduceSum <keepdims = 0> (v, last)") == [("token",)]
    assert held(f"{CHOICE} y = ReduceSum (v, first)") is None  # over the tokens


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (f"{TOTAL} y = Div (v, t)", ""),
        (f"{TOTAL} s = Add (t, tiny) y = Div (v, s)", ""),  # lost in float32 beside the two largest of four
        (f"{TOTAL} s = Add (t, half) y = Div (v, s)", "0.5 is added to the sum of the weights"),
        (f"{EXP} s = Add (t, tiny) y = Div (v, s)", "1e-20 is added to the sum of the weights"),
        (f"{TOTAL} s = Max (t, half) y = Div (v, s)", "the sum of the weights is at least 0.5"),
        (f"{TOTAL} s = Clip (t, half) y = Div (v, s)", "the sum of the weights is at least 0.5"),
        (f"{TOTAL} q, j = TopK (r, k) y = Div (q, t)", "weights are divided by a sum of others"),
        (
            f"{TOTAL} f = Gather (shift, i) g = Mul (v, f) y = Div (g, t)",
            "weights are divided by a sum of others",
        ),
    ],
)
def test_divided_by_their_sum(body, fault):
    found = held(body)
    assert isinstance(found, Mixing) and found.stage == ("raw" if "others" in fault else "normalised")
    assert found.fault.startswith(fault) and bool(found.fault) == bool(fault)


def test_scaled():
    assert held(f"{CHOICE} y = Mul (v, c2)").scale == 2
    assert held(f"{CHOICE} y = Div (v, c2)").scale == 0.5
    assert held(f"{CHOICE} y = Div (v, c0)") is None
    found = held(f"{CHOICE} f = Gather (shift, i) y = Mul (v, f)")
    assert found.table.shape == (4,) and not found.fault
    twice = held(f"{CHOICE} f = Gather (shift, i) g = Mul (v, f) y = Mul (g, f)")
    assert "other than a factor for each chosen expert" in twice.fault


def test_of_every_expert():
    found = held("p = Softmax (r) y = Mul (p, c2)")
    assert (found.mixing.scale, found.mixing.value) == (2, None)


def test_the_first_fault_is_kept():
    found = held(f"{TOTAL} s = Max (t, half) q = Div (v, s) f = Gather (shift, i) g = Mul (q, f) y = Mul (g, f)")
    assert "at least 0.5" in found.fault
