"""One number everywhere, by itself: what sums and scatters begin with."""

from __future__ import annotations

import pytest
from stated import held, kinds

from rewriter.rules.blocks.axes import Uniform
from rewriter.rules.blocks.contents import Features


@pytest.mark.parametrize(
    ("body", "number"),
    [
        ("y = ConstantOfShape (s)", 0),
        ("y = ConstantOfShape <value = float[1] {1}> (s)", 1),
        ("y = Expand (c2, s)", 2),
        ("e = Expand (one, s) y = Cast <to = 1> (e)", 1),
        ("e = Expand (c0, s) y = CastLike (e, ids)", 0),
    ],
)
def test_a_number_in_a_known_shape(body, number):
    assert held(f"s = Shape (x) {body}") == Uniform(number)
    assert kinds(f"s = Shape (x) {body}") == [("repeat",), ("repeat",)]


def test_what_is_none():
    assert held("s = Shape (x) e = Expand (half, s) y = Cast <to = 7> (e)") is None  # what is left is another number
    assert held("y = ConstantOfShape (ids)") is None
    assert held("s = Shape (x) y = Expand (b, s)") is None


def test_zeros_change_nothing():
    zeros = "s = Shape (x) h = MatMul (x, gate) t = Shape (h) z = ConstantOfShape (t)"
    assert isinstance(held(f"{zeros} y = Add (z, h)"), Features)
    assert isinstance(held(f"{zeros} y = Sub (h, z)"), Features)
    assert held(f"{zeros} e = Expand (c2, t) y = Add (e, h)") is None
