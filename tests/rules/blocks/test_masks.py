"""Masks by themselves: where a router chose an expert, and where one is chosen at all."""

from __future__ import annotations

import pytest
from stated import CHOICE, SORTED, held, kinds

from rewriter.rules.blocks.mixing import Mask, Without


@pytest.mark.parametrize(
    ("body", "expert", "last"),
    [
        ("y = Equal (i, one)", 1, "slot"),
        ("y = Equal (two, i)", 2, "slot"),
        ("u = Unsqueeze (i, last) y = Equal (u, numbers)", None, "expert"),
        ("y = OneHot (i, four, off_on)", None, "expert"),
    ],
)
def test_a_mask(body, expert, last):
    found = held(f"{CHOICE} {body}")
    assert isinstance(found, Mask) and (found.expert, found.slot) == (expert, None)
    assert kinds(f"{CHOICE} {body}")[-1] == (last,)


def test_masks_that_are_none():
    assert held(f"{CHOICE} u = Unsqueeze (i, last) y = Equal (u, wrong)") is None
    assert held(f"{CHOICE} y = OneHot (i, k, off_on)") is None


def test_where_a_mask_does_not_hold():
    assert isinstance(held(f"{CHOICE} m = Equal (i, one) y = Not (m)"), Without)


def test_a_mask_of_sorted_rows():
    found = held(f"{SORTED} y = Equal (s, one)")
    assert isinstance(found, Mask) and found.expert == 1
    assert kinds(f"{SORTED} y = Equal (s, one)") == [("row",)]
    assert held(f"{SORTED} y = Equal (d, one)") is None  # which pair it is, and not which expert
    assert held(f"{SORTED} h = Div (s, two) y = Equal (h, one)") is None  # two experts have that number
