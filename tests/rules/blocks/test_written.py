"""Rows of one expert, written back, by themselves: what a scatter of them states."""

from __future__ import annotations

import pytest
from stated import held, kinds, reason
from test_hits import BACK

from rewriter.rules.blocks.mixing import Mixed


@pytest.mark.parametrize(
    "body",
    ['y = ScatterND <reduction = "add"> (e, j, p1)', "y = ScatterND (e, j, p1)"],
)
def test_the_way_back(body):
    found = held(f"{BACK} {body}")
    assert isinstance(found, Mixed) and [term.expert for term in found.terms()] == [1]
    assert kinds(f"{BACK} {body}") == [("token",), ("feature",)]


def test_rows_that_replace_a_sum():
    body = f"{BACK} n = Tanh (x) y = ScatterND (n, j, p1)"
    assert reason(body) == "the rows of expert 1 replace what was summed before"


def test_rows_of_another_expert():
    other = "m2 = Equal (i, two) d2 = NonZero (m2) t2 = Gather (d2, zero) j2 = Unsqueeze (t2, last)"
    body = f'{BACK} {other} y = ScatterND <reduction = "add"> (e, j2, p1)'
    assert reason(body) == "rows of expert 1 are written where expert 2 was chosen"
