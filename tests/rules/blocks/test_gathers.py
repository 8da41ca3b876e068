"""Gathers by themselves: what a router's choice takes from a constant of all experts, or of their outputs."""

from __future__ import annotations

import pytest
from stated import CHOICE, SORTED, STACKED, held, kinds, stated

from rewriter.rules.blocks.contents import Output, Router, Slot, Tokens
from rewriter.rules.blocks.mixing import Stack


@pytest.mark.parametrize("body", ["y = Gather (gates, i)", "u = Unsqueeze (i, last) y = GatherND (gates, u)"])
def test_a_choice_from_a_constant(body):
    found = held(f"{CHOICE} {body}")
    assert isinstance(found, Stack) and isinstance(found.by, Router) and found.view.shape == (4, 8, 6)
    assert kinds(f"{CHOICE} {body}") == [("token",), ("slot",), ("weight",), ("weight",)]


def test_a_part_of_a_choice_from_a_constant():
    body = f"{CHOICE} w = Gather (ups, i) z, y = Split <axis = 3> (w, halves)"
    found = held(body)
    assert isinstance(found, Stack) and (found.view.shape, found.view.offset) == ((4, 8, 3), 3)
    assert kinds(body) == [("token",), ("slot",), ("weight",), ("weight",)]
    assert held(f"{CHOICE} w = Gather (ups, i) y = Slice (w, first, second, second)") is None  # of one slot


def test_one_slot_from_a_constant():
    found = held(f"{CHOICE} j = Gather <axis = 1> (i, one) y = Gather (gates, j)")
    assert isinstance(found.by, Slot) and found.by.number == 1


def test_a_choice_from_the_outputs_of_all():
    body = "t = Transpose <perm = [1, 0, 2]> (o) u = Unsqueeze (i, last) z = Shape (x) h_ = Slice (z, second, third)"
    body = f"{STACKED} {CHOICE} {body} e = Concat <axis = 0> (one_, two_, h_) j = Expand (u, e)"
    body = body.replace("e = Concat", "one_ = Slice (z, first, second) two_ = Identity (k) e = Concat")
    found = held(f"{body} y = GatherElements <axis = 1> (t, j)")
    assert isinstance(found, Output) and isinstance(found.by, Router)


def test_rows_in_the_order_of_their_experts():
    body = f"{SORTED} t = Div (d, two) y = Gather (x, t)"
    assert isinstance(held(body), Tokens)
    assert kinds(body) == [("row",), ("feature",)]
    found = held(f"{SORTED} y = Gather (gates, s)")
    assert isinstance(found, Stack) and isinstance(found.by, Router)


def test_what_is_none():
    assert stated("y = Gather (gates, zero)") is None  # a constant
    assert stated(f"{CHOICE} y = Gather <axis = 1> (gates, i)") is None  # not along the experts
    assert stated(f"{CHOICE} y = Gather (bias, i)") is None  # six rows for four experts
    assert stated(f"{SORTED} y = Gather (x, d)") is None  # pairs, and no tokens
