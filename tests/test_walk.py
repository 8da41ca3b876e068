"""The one walk: nearest first, each place once, and it says when it gave up."""

from __future__ import annotations

import pytest
from support import parse

from rewriter.graph.declines import Declined
from rewriter.graph.walk import GaveUp, producers, readers, walk


def below(number):
    return [number * 2, number * 2 + 1] if number < 8 else []


def test_nearest_first_each_once():
    assert list(walk([1], below)) == list(range(1, 16))
    assert list(walk([3, 1, 3], lambda n: [1, 2, 3])) == [3, 1, 2]


def test_it_says_when_it_gave_up():
    found = walk([1], below, limit=4)
    with pytest.raises(GaveUp, match="gave up after 4 places") as gave_up:
        list(found)
    assert isinstance(gave_up.value, Declined)


def test_a_bound_that_is_just_enough_is_no_reason_to_give_up():
    assert len(list(walk([1], below, limit=15))) == 15


def test_a_circle_ends_without_a_bound():
    assert list(walk([0], lambda n: [(n + 1) % 3], limit=None)) == [0, 1, 2]


def test_steps_along_a_graph():
    model = parse("g (float[2] x) => (float[2] d) { a = Relu (x) b = Add (a, x) c = Add (b, a) d = Add (c, c) }")
    names = [value.name for value in walk([model.graph.outputs[0]], producers)]
    assert names == ["d", "c", "b", "a", "x"]
    (x,) = model.graph.inputs
    assert [node.outputs[0].name for node in readers(x)] == ["a", "b"]
