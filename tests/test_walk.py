"""The one walk: nearest first, each place once, and it says when it gave up."""

from __future__ import annotations

import ast
from pathlib import Path

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


ROOT = Path(__file__).parent.parent
OWN = {
    "rewriter/engine/commit.py": "a node is tried once more when nothing reads a value of it any more",
    "rewriter/facts/facts.py": "a fixpoint: a node is visited again when what is known of its inputs changed",
    "rewriter/facts/shapes.py": "a value's extents come after those that they follow from, whatever asked first",
    "rewriter/graph/walk.py": "the walk that the others are written with",
    "rewriter/parity/subgraph.py": "puts nodes in order: one is listed after all that it reads",
    "rules/blocks/axes.py": "indices taken off one end of a dimension until they make up an extent, no graph",
    "rules/blocks/mixing.py": "leaves of a tree from left to right, no graph",
}
"""Files that may have a worklist of their own, and why."""
STEPS = {"producer", "uses", "consumers", "predecessors", "successors"}


def called(node):
    """(name of the object or None, method) of each method called within a piece of code."""
    for part in ast.walk(node):
        if isinstance(part, ast.Call) and isinstance(part.func, ast.Attribute):
            held = part.func.value
            yield (held.id if isinstance(held, ast.Name) else None), part.func.attr


def walks(code):
    """Lines where code goes from place to place by itself: by a list that it works off, or step by step."""
    for loop in ast.walk(ast.parse(code)):
        if not isinstance(loop, ast.While | ast.For):
            continue
        calls = set(called(loop))
        grown = {name for name, method in calls if method in ("append", "extend", "update", "add")}
        assigned = [n.target for n in ast.walk(loop) if isinstance(n, ast.AugAssign)]
        grown |= {target.id for target in assigned if isinstance(target, ast.Name)}
        if isinstance(loop, ast.For):
            worked_off = {loop.iter.id} if isinstance(loop.iter, ast.Name) else set()
        else:
            worked_off = {name for name, method in calls if method in ("pop", "popleft", "popitem")}
        stepping = isinstance(loop, ast.While) and STEPS & {method for _, method in calls}
        if (grown & worked_off) - {None} or stepping:
            yield loop.lineno


def test_no_walk_is_written_by_hand():
    """Else each has a bound of its own, or none, and ends without a word."""
    files = [file for folder in ("rewriter", "rules") for file in (ROOT / folder).rglob("*.py")]
    found = {}
    for file in files:
        name = file.relative_to(ROOT).as_posix()
        if not name.startswith("rewriter/rules/"):
            found[name] = list(walks(file.read_text()))
    assert len(found) > 200
    assert {name for name, lines in found.items() if lines} == set(OWN)


@pytest.mark.parametrize(
    "code",
    [
        "while pending:\n    node = pending.pop()\n    pending.extend(node.inputs)",
        "while pending:\n    node = pending.popleft()\n    pending += node.inputs",
        "for node in queue:\n    queue.append(node.inputs[0])",
        "while (node := value.producer()) is not None:\n    value = node.inputs[0]",
    ],
)
def test_a_walk_written_by_hand_is_found(code):
    assert list(walks(code)) == [1]
