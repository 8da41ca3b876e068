"""Tables by themselves: a token's experts, looked up by its id, as in hash layers."""

from __future__ import annotations

import pytest
from stated import held, kinds, stated

from rewriter.rules.blocks.mixing import Chosen, Mixing


@pytest.mark.parametrize("body", ["y = Gather (table, ids)", "u = Unsqueeze (ids, last) y = GatherND (table, u)"])
def test_a_table_chooses(body):
    found = held(body)
    assert isinstance(found, Chosen) and (found.router.k, found.router.experts) == (2, 4)
    assert not found.router.selects and not found.router.made
    assert kinds(body) == [("token",), ("slot",)]


def test_a_table_of_one_expert_each():
    found = held("c = Identity (numbers) y = Gather (c, ids)")
    assert (found.slot, found.router.k) == (0, 1)


def test_the_scores_say_how_many_experts_there_are():
    few = "e = Constant <value_ints = [0, 1]> () i = Gather (e, ids)"
    assert held(f"{few} y = Identity (i)").router.experts == 2
    found = held(f"{few} u = Unsqueeze (i, last) y = GatherElements <axis = 1> (r, u)")
    assert found is None or found.router.experts == 4
    found = held("i = Gather (table, ids) y = GatherElements <axis = 1> (r, i)")
    assert isinstance(found, Mixing) and found.router.experts == 4


def test_an_expert_twice_is_remembered():
    assert held("y = Gather (twice, ids)").router.made


def test_what_chooses_nothing():
    assert stated("y = Gather (negative, ids)") is None
    assert stated("y = Gather (table, one)") is None
    assert stated("y = Gather <axis = 1> (table, ids)") is None
    assert stated("y = Gather (gate, ids)") is None  # floats
