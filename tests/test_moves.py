"""Movement operators are read into primitive moves, and extents follow; what they show: test_views."""

from __future__ import annotations

import pytest
from support import parse

from rewriter.facts import Facts
from rewriter.facts.constants import constants
from rewriter.facts.moves import Cut, Drop, Insert, Parts, Permute, Regroup, Repeat, Select, Take, moved, read
from rewriter.facts.size import Size
from rewriter.graph.declines import Declined

SYMBOLIC = (Size(1, ("B",)), Size(4), Size(6))
CONSTANTS = """<int64 i = {-1}, int64[3] run = {1, 2, 3}, int64[3] back = {3, 2, 1}, int64[3] uneven = {0, 3, 1},
    int64[1] one = {1}, int64[1] two = {2}, int64[1] three = {3}, int64[2] axes = {0, 3}, int64[2] shape = {0, -1},
    int64[1] last = {-1}, int64[3] times = {1, 2, 1}, int64[2] parts = {1, 3}, int64 two0 = {2},
    int64[1] far = {4}>
"""


def moves(body, dims=SYMBOLIC, inputs="", opset=21):
    """The moves of the first node of a graph on ``x``, for its outputs in order."""
    model = parse(f"g (float[B,4,6] x{inputs}) => (float[d] out) {CONSTANTS} {{ {body} out = Relu (x) }}", opset=opset)
    facts = Facts(model, constants)
    facts.compute()
    node = model.graph[0]
    found = read(facts, node, dims)
    return [found[value] for value in node.outputs]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("a = Identity (x)", ()),
        ("a = Transpose (x)", (Permute((2, 1, 0)),)),
        ("a = Transpose <perm = [1, 0, 2]> (x)", (Permute((1, 0, 2)),)),
        ("a = Gather <axis = 1> (x, i)", (Take(1, 3),)),
        ("a = Gather <axis = -1> (x, run)", (Cut(2, 1, 3),)),
        ("a = Gather <axis = 1> (x, back)", (Cut(1, 3, 3, -1),)),
        ("a = Gather <axis = 1> (x, uneven)", (Select(1, (0, 3, 1)),)),
        ("a = Slice (x, one, last, two)", (Cut(2, 1, 4),)),
        ("a = Slice (x, one, last, two, two)", (Cut(2, 1, 2, 2),)),
        ("a = Slice (x, last, one, one, last)", (Cut(1, 3, 2, -1),)),
        ("a = Unsqueeze (x, axes)", (Insert((0, 3)),)),
        ("a = Reshape (x, shape)", (Regroup((Size(1, ("B",)), Size(24))),)),
        ("a = Flatten (x)", (Regroup((Size(1, ("B",)), Size(24))),)),
        ("a = Flatten <axis = -1> (x)", (Regroup((Size(4, ("B",)), Size(6))),)),
        ("a = Expand (x, times)", (Repeat((Size(), Size(2), Size())),)),
        ("a = Tile (x, times)", (Repeat((Size(), Size(2), Size()), tiled=True),)),
        ("a = Relu (x)", None),
    ],
)
def test_an_operator_is_read_into_moves(body, expected):
    if expected is None:
        with pytest.raises(KeyError):
            moves(body)
    else:
        assert moves(body) == [expected]


def test_a_squeeze_drops_what_is_of_extent_one():
    dims = (Size(), Size(4), Size())
    assert moves("a = Squeeze (x)", dims) == [(Drop((0, 2)),)]
    assert moves("a = Squeeze (x, last)", dims) == [(Drop((2,)),)]
    with pytest.raises(Declined, match="not of extent 1"):
        moves("a = Squeeze (x, one)", dims)
    with pytest.raises(Declined, match="axes depend"):
        moves("a = Squeeze (x)")


def test_parts_of_a_split():
    assert moves("a, b = Split <axis = 1> (x)") == [(Cut(1, 0, 2),), (Cut(1, 2, 2),)]
    assert moves("a, b = Split <axis = 1> (x, parts)") == [(Cut(1, 0, 1),), (Cut(1, 1, 3),)]
    with pytest.raises(Declined, match="do not make up extent 6"):
        moves("a, b = Split <axis = 2> (x, parts)")


def test_parts_of_a_sequence():
    kept, gone = (moves(f"a = SplitToSequence <axis = 1, keepdims = {k}> (x)") for k in (1, 0))
    assert kept == [Parts(tuple((Cut(1, i, 1),) for i in range(4)))]
    assert gone == [Parts(tuple((Take(1, i),) for i in range(4)))]
    assert moves("a = SplitToSequence <axis = 1> (x, parts)") == [Parts(((Cut(1, 0, 1),), (Cut(1, 1, 3),)))]
    assert moves("a = SplitToSequence <axis = 2> (x, two0)") == [Parts(tuple((Cut(2, i, 2),) for i in (0, 2, 4)))]


@pytest.mark.parametrize("keepdims", [0, 1])
def test_a_sequence_of_endless_parts_is_not_followed(keepdims):
    """Whoever asks with an extent far beyond any, since it is not known, must not be given a list of that length."""
    with pytest.raises(Declined, match="parts of a sequence"):
        moves(f"a = SplitToSequence <axis = 0, keepdims = {keepdims}> (x)", (Size(2**62),))


def test_operands_are_attributes_in_older_opsets():
    assert moves("a = Unsqueeze <axes = [1]> (x)", opset=11) == [(Insert((1,)),)]
    assert moves("a = Slice <starts = [1], ends = [3]> (x)", (Size(8), Size(4)), opset=9) == [(Cut(0, 1, 2),)]
    assert moves("a, b = Split <axis = 2, split = [2, 4]> (x)", opset=11) == [(Cut(2, 0, 2),), (Cut(2, 2, 4),)]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("a = Gather <axis = 1> (x, at)", "the index depends on an input"),
        ("a = Slice (x, at, last, one)", "the bounds depend on an input"),
        ("a = Slice (x, one, last, at)", "the axes or steps depend on an input"),
        ("a = Reshape (x, at)", "the shape depends on an input"),
        ("a = Gather (x, i)", "the extent of an axis is unknown"),
        ("a = Gather <axis = 1> (x, far)", "outside axis 1 of extent 4"),
    ],
)
def test_what_depends_on_an_input_or_does_not_fit_declines(body, reason):
    with pytest.raises(Declined, match=reason):
        moves(body, inputs=", int64[1] at")


def test_extents_follow_the_moves():
    chain = (
        Permute((1, 0, 2)),
        Take(0, 3),
        Insert((1,)),
        Cut(2, 0, 5, 1),
        Repeat((Size(), Size(7), Size())),
        Drop((0,)),
    )
    b = Size(1, ("B",))
    assert moved(SYMBOLIC, chain[:1]) == (Size(4), b, Size(6))
    assert moved(SYMBOLIC, chain[:2]) == (b, Size(6))
    assert moved(SYMBOLIC, chain[:3]) == (b, Size(), Size(6))
    assert moved(SYMBOLIC, chain[:4]) == (b, Size(), Size(5))
    assert moved(SYMBOLIC, chain[:5]) == (b, Size(7), Size(5))
    assert moved((Size(), b), (Drop((0,)), Insert((0,)), Repeat((Size(2), Size(3)), tiled=True))) == (
        Size(2),
        b * Size(3),
    )
    assert moved(SYMBOLIC, (Select(1, (0, 3, 1)), Repeat((Size(2), Size(), Size(), Size())))) == (
        Size(2),
        b,
        Size(3),
        Size(6),
    )
    assert moved(SYMBOLIC, (Regroup((Size(24), b)),)) == (Size(24), b)
