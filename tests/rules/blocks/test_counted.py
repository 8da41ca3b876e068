"""Counted rows by themselves: how many each expert has, where they end, rows that are split by these counts."""

from __future__ import annotations

import pytest
from stated import CHOICE, SORTED, held, kinds, reason

from rewriter.rules.blocks.contents import Tokens
from rewriter.rules.blocks.mixing import Mask
from rewriter.rules.blocks.rows import Counts, End

ZEROS = "z = Constant <value_ints = [0, 0, 0, 0]> ()"
HISTOGRAM = f'{SORTED} {ZEROS} o1 = Expand (one, n) q = ScatterElements <axis = 0, reduction = "add"> (z, s, o1)'
CLIPPED = "e = Cast <to = 1> (s) m = Clip (e, c1, c2) l = Cast <to = 7> (m)"
HOT = f"{CHOICE} w = Shape (r) e = ConstantOfShape (w) g = Shape (i) o1 = Expand (c1, g)"


@pytest.mark.parametrize(
    "body",
    [
        HISTOGRAM.replace(" q = ", " y = "),
        f'{SORTED} {ZEROS} o1 = Expand (one, n) y = ScatterElements <axis = 0, reduction = "add"> (z, f, o1)',
        f"{HOT} h = ScatterElements <axis = 1> (e, i, o1) y = ReduceSum <keepdims = 0> (h, first)",
    ],
)
def test_how_many_rows_each_expert_has(body):
    found = held(body)
    assert isinstance(found, Counts) and not found.cumulated
    assert kinds(body) == [("expert",)]


def test_which_tokens_are_each_experts():
    found = held(f"{HOT} y = ScatterElements <axis = 1> (e, i, o1)")
    assert isinstance(found, Mask) and found.whole and found.expert is None


def test_what_counts_something_else():
    assert held(HISTOGRAM.replace(' reduction = "add"', ' reduction = "max"').replace(" q = ", " y = ")) is None
    assert held(HISTOGRAM.replace("Expand (one, n)", "Expand (two, n)").replace(" q = ", " y = ")) is None
    other = HISTOGRAM.replace("(z, s, o1)", "(z, l, o1)").replace(
        " q = ", " e = Cast <to = 1> (s) m = Clip (e, c1, c2) l = Cast <to = 7> (m) y = "
    )
    assert reason(other) == "the histogram counts something other than each expert's rows"


def test_where_they_end():
    assert held(f"{HISTOGRAM} y = CumSum (q, zero)").cumulated
    found = held(f"{HISTOGRAM} e = CumSum (q, zero) y = Gather (e, two)")
    assert isinstance(found, End) and found.expert == 2
    assert held(f"{HISTOGRAM} y = CumSum <reverse = 1> (q, zero)") is None


def test_rows_split_by_counts():
    body = f"{HISTOGRAM} t = Div (d, two) rows_ = Gather (x, t)"
    assert isinstance(held(f"{body} a, b_, y, c = Split (rows_, q)"), Tokens)
    assert kinds(f"{body} a, b_, y, c = Split (rows_, q)") == [("group",), ("feature",)]
    assert held(f"{body} e = CumSum (q, zero) a, b_, y, c = Split (rows_, e)") is None


def test_counts_in_turn():
    part = "l{0} = Constant <value_ints = [{0}]> () u{0} = Gather (q, l{0})"
    body = " ".join((HISTOGRAM, *(part.format(number) for number in range(4))))
    assert isinstance(held(f"{body} y = Concat <axis = 0> (u0, u1, u2, u3)"), Counts)
    assert "not those of every expert in turn" in reason(f"{body} y = Concat <axis = 0> (u1, u0, u2, u3)")
