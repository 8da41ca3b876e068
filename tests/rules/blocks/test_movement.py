"""Movement by itself: the same content on other axes, or a part of it, and the same of sizes."""

from __future__ import annotations

import pytest
from stated import CHOICE, STACKED, held, kinds, stated

from rewriter.facts.size import Integers
from rewriter.rules.blocks.contents import Features, Output, Tokens
from rewriter.rules.blocks.mixing import Chosen, Mixing


@pytest.mark.parametrize("body", ["y = Identity (x)", "y = Unsqueeze (x, first)", "y = Expand (x, second)"])
def test_a_value_of_rows_is_tokens(body):
    content = held(body)
    assert isinstance(content, Tokens) and content.x.name == "x"


def test_tokens_with_a_dimension_between_are_tokens():
    body = "s = Constant <value_ints = [-1, 1, 8]> () y = Reshape (x, s)"
    assert held(body).x.name == "x"
    assert kinds(body) == [("token",), (), ("feature",)]


@pytest.mark.parametrize("shape", ["-1, 4", "-1, 2, 4", "-1, 2, 8"])
def test_tokens_in_another_shape_are_none(shape):
    assert held(f"s = Constant <value_ints = [{shape}]> () y = Reshape (x, s)") is None


def test_a_part_of_a_linear_is_a_linear_of_a_part():
    body = "h = MatMul (x, gate) y = Slice (h, first, third, last)"
    assert isinstance(held(body), Features)
    assert held(body).factors[0].linear.weight.sizes == (2, 8)
    halves = "h = MatMul (x, gate) z, y = Split <axis = -1> (h, halves)"
    weight = held(halves).factors[0].linear.weight
    assert (
        weight.sizes == (3, 8)
        and weight.view.offset != held("y = MatMul (x, gate)").factors[0].linear.weight.view.offset
    )


def test_one_of_all_experts():
    content = held(f"{STACKED} y = Gather (o, two)")
    assert isinstance(content, Output) and content.by == "one" and content.down.sizes == (8, 6)


def test_axes_go_where_the_operator_puts_them():
    assert kinds("h = MatMul (x, gates) y = Transpose <perm = [1, 0, 2]> (h)") == [
        ("token",),
        ("expert",),
        ("feature",),
    ]
    assert kinds(f"{CHOICE} y = Reshape (i, flat)") == [("token", "slot")]
    assert kinds(f"{CHOICE} y = Unsqueeze (i, last)") == [("token",), ("slot",), ()]


def test_one_slot_of_a_choice():
    chosen = held(f"{CHOICE} y = Gather <axis = 1> (i, one)")
    assert isinstance(chosen, Chosen) and chosen.slot == 1
    weights = held(f"{CHOICE} y = Slice (v, first, second, last)")
    assert isinstance(weights, Mixing) and weights.slot == 0


def test_sizes():
    assert stated("s = Shape (x) y = Gather (s, one)", Integers).sizes[0].constant == 8
    assert stated("s = Shape (x) y = Slice (s, second, third)", Integers).sizes[0].constant == 8
    both = stated("s = Shape (x) t = Slice (s, first, second) y = Concat <axis = 0> (t, four)", Integers)
    assert [size.constant for size in both.sizes] == [None, 4]


def test_constants_have_facts_of_their_own():
    assert stated("y = Transpose (gate)") is None
