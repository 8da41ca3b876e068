"""Nodes by operator: those of a walk over the model, whatever commits did to it, and no walk where they did nothing."""

from __future__ import annotations

import pytest
from onnxscript.rewriter import RewriteRuleClassBase
from support import parse

import rewriter
from rewriter.engine import listed
from rewriter.engine.listed import ListedNodes
from rewriter.engine.proposal import Change
from rewriter.engine.purity import checked

RELU, NEG = ("", "Relu"), ("", "Neg")
TEXT = """
    g (float[2] x, bool c) => (float[2] y, float[2] z) {
       a = Relu (x)
       b = Neg (a)
       y = Relu (b)
       z = If (c) <then_branch = h () => (float[2] r) { r = Relu (b) },
                   else_branch = i () => (float[2] q) { q = Neg (a) }>
    }"""


def names(nodes):
    return [node.outputs[0].name for node in nodes]


def test_nodes_of_several_operators_come_in_the_order_of_the_model():
    nodes = ListedNodes(parse(TEXT))
    assert names(nodes.of([RELU])) == ["a", "y", "r"]
    assert names(nodes.of({NEG: 1, RELU: 2, ("", "Exp"): 3})) == ["a", "b", "y", "r", "q"]


@pytest.mark.parametrize("body", [True, False])
def test_what_a_commit_removes_and_adds(body):
    model = parse(TEXT)
    nodes = ListedNodes(model)
    assert len(nodes.of([RELU])) == 3
    *_, relu, branches = model.graph
    gone, count = (branches, 2) if body else (relu, 2)
    model.graph.outputs.pop(1 if body else 0)
    model.graph.remove(gone)
    nodes.follow(Change([gone], [], []))
    assert len(nodes.of([RELU])) == count
    model.graph.insert_before(model.graph[1], gone)
    nodes.follow(Change([], [gone], []))
    assert names(nodes.of([RELU])) == (["a", "r", "y"] if body else ["a", "y", "r"])
    nodes.follow(Change([model.graph[1]], [], []))  # of an operator that nobody asked for since it came


def test_another_order():
    model = parse("g (float[2] x) => (float[2] y) { a = Relu (x) y = Relu (x) }")
    nodes = ListedNodes(model)
    assert names(nodes.of([RELU])) == ["a", "y"]
    first, _ = model.graph
    model.graph.remove(first)
    model.graph.append(first)
    with checked(), pytest.raises(AssertionError, match="not those of the model"):
        nodes.of([RELU])
    nodes.follow(Change([], [], [], reordered=True))
    assert names(nodes.of([RELU])) == ["y", "a"]


class Drop(RewriteRuleClassBase):
    def pattern(self, op, x):
        return op.Neg(op.Neg(x))

    def rewrite(self, op, x):
        return op.Identity(x)


def test_a_sweep_that_finds_nothing_walks_over_nothing(monkeypatch):
    walks = []
    monkeypatch.setattr(listed, "all_nodes", lambda model, walk=listed.all_nodes: walks.append(1) or walk(model))
    monkeypatch.setattr(listed, "is_checked", lambda: False)  # which walks over all
    model = parse("g (float[2] x) => (float[2] y) { a = Neg (x) b = Neg (a) y = Relu (b) }")
    report = rewriter.apply(model, [Drop], overrides={"parity.local": "none"}).report
    assert report.sweeps == {"rules": 2} and report.applied == {"drop": 1}
    assert len(walks) == 1
