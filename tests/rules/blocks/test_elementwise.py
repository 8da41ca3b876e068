"""Elementwise operators by themselves: the laws of every family are asked, and sizes are calculated."""

from __future__ import annotations

import pytest
from stated import held, kinds, stated

from rewriter.facts.size import Integers
from rewriter.rules.blocks.contents import Features
from rewriter.rules.blocks.laws import Laws


@pytest.mark.parametrize("body", ["y = Mul (h, c2)", "y = Mul (c2, h)"])
def test_operands_that_commute(body):
    assert held(f"h = MatMul (x, gate) {body}").factors[0].steps == (("scale", 2.0),)


def test_those_that_do_not():
    assert held("h = MatMul (x, gate) y = Sub (h, c2)").factors[0].steps == (("add", -2.0),)
    assert held("h = MatMul (x, gate) y = Sub (c2, h)") is None


@pytest.mark.parametrize(("op_type", "expected"), [("Mul", 16), ("Div", 4), ("Add", 10), ("Sub", 6)])
def test_sizes(op_type, expected):
    found = stated(f"s = Shape (x) d = Gather (s, one) y = {op_type} (d, two)", Integers)
    assert found.sizes[0].constant == expected


def test_axes_that_do_not_fit():
    body = "h = MatMul (x, gates) t = Transpose <perm = [0, 2, 1]> (h) u = MatMul (x, ups) y = Mul (t, u)"
    assert held(body) is None
    assert kinds("h = MatMul (x, gates) u = MatMul (x, ups) y = Mul (h, u)") == [("expert",), ("token",), ("feature",)]


@pytest.mark.parametrize("op_type", ["Max", "Sum"])
def test_an_operator_of_one_operand_is_nothing(op_type):
    assert isinstance(held(f"h = MatMul (x, gate) y = {op_type} (h)"), Features)


def test_laws_are_asked_in_the_order_in_which_they_were_added():
    laws = Laws()

    @laws.at("Mul", "Add")
    def first():
        """Of two operators."""

    @laws.at("Add")
    def second():
        """Of one."""

    assert list(laws.of("Add")) == [first, second]
    assert list(laws.of("Mul")) == [first] and not list(laws.of("Sub"))
