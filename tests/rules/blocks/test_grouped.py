"""Grouped rows by themselves: pairs sorted by expert, the token of each row, an expert's rows, and the way back."""

from __future__ import annotations

import pytest
from stated import PLAIN, SORTED, held, kinds, reason

from rewriter.rules.blocks.axes import Uniform
from rewriter.rules.blocks.contents import Output
from rewriter.rules.blocks.rows import Arange, Inverse, Order, RowSlot, RowToken, Sorted


def test_a_sort_of_the_choice():
    found = held(SORTED.replace("s, d", "y, d"))
    assert isinstance(found, Sorted) and found.values == (0, 1, 2, 3)
    assert isinstance(held(SORTED.replace("s, d", "s, y")), Order)
    assert kinds(SORTED.replace("s, d", "s, y")) == [("row",)]
    assert held(SORTED.replace("largest = 0", "largest = 1").replace("s, d", "y, d")) is None
    assert held(SORTED.replace("(f, n)", "(f, k)").replace("s, d", "s, y")) is None  # not all of them


@pytest.mark.parametrize(
    ("body", "content"),
    [
        ("y = Mod (d, two)", RowSlot),
        ("y = Div (d, two)", RowToken),
        ("y = Div (d, three)", None),
        ("y = Less (d, zero)", Uniform),
        ("y = Less (d, one)", None),
        ("y = GreaterOrEqual (d, zero)", Uniform),
    ],
)
def test_arithmetic_of_positions(body, content):
    assert type(held(f"{SORTED} {body}")) is (content or type(None))


def test_a_division_in_floats_is_exact_once_it_is_rounded_down():
    body = f"{SORTED} e = Cast <to = 1> (d) q = Div (e, c2)"
    assert not held(f"{body} y = Identity (q)").exact
    assert held(f"{body} y = Floor (q)").exact
    assert held(f"{body} a = Abs (q) f2 = Floor (a) g = Sign (q) y = Mul (f2, g)").exact


def test_a_function_of_the_expert():
    assert held(f"{SORTED} e = Cast <to = 1> (s) y = Clip (e, c1, c2)").values == (1, 1, 2, 2)
    assert held(f"{SORTED} e = Cast <to = 1> (s) y = Div (e, c2)").values == (0, 0.5, 1, 1.5)


def test_the_way_back():
    zeros = f"{SORTED} z = ConstantOfShape <value = int64[1] {{0}}> (n) c = Gather (n, zero) a = Range (zero, c, one)"
    assert isinstance(held(zeros.replace(" a = ", " y = ")), Arange)
    found = held(f"{zeros} u = Unsqueeze (d, last) y = ScatterND (z, u, a)")
    assert isinstance(found, Inverse)


def test_outputs_side_by_side():
    each = "u{0} = Unsqueeze (o, first)"
    parts = " ".join(each.format(number) for number in range(4))
    found = held(f"{PLAIN} {parts} y = Concat <axis = 0> (u0, u1, u2, u3)")
    assert isinstance(found, Output) and found.by == "all" and found.down.stack_size == 4
    assert held(f"{PLAIN} {parts} n = Tanh (u1) y = Concat <axis = 0> (u0, n)") is None


def test_rows_of_a_range_that_begins_elsewhere():
    counts = f"{SORTED} ones = Expand (one, n) z = Constant <value_ints = [0, 0, 0, 0]> ()"
    counts += ' q = ScatterElements <axis = 0, reduction = "add"> (z, s, ones) e = CumSum (q, zero)'
    ends = f"{counts} a = Gather (e, zero) b2 = Gather (e, one) b3 = Gather (e, two)"
    assert held(f"{ends} y = Range (a, b2, one)").expert == 1
    assert held(f"{ends} y = Range (zero, a, one)").expert == 0
    assert "do not begin where those of the one before end" in reason(f"{ends} y = Range (a, b3, one)")
    assert held("y = Range (one, two, one)") is None
