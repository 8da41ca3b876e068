"""Nodes by operator: those of a walk over the model, whatever commits did to it, and no walk where they did nothing."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from onnxscript.rewriter import RewriteRuleClassBase
from support import parse

import rewriter
from rewriter.engine import listed
from rewriter.engine.listed import ListedNodes
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


def test_what_commits_remove_and_add():
    model = parse(TEXT)
    nodes = ListedNodes(model)
    assert names(nodes.of([RELU])) == ["a", "y", "r"]
    *_, relu, _ = model.graph
    model.graph.outputs.pop(0)
    model.graph.remove(relu)
    assert names(nodes.of([RELU])) == ["a", "r"]
    model.graph.insert_before(model.graph[0], relu)
    nodes.follow([relu])
    assert names(nodes.of([NEG])) == ["b", "q"]
    model.graph.remove(relu)  # which nobody asked for since it came
    assert names(nodes.of([RELU])) == ["a", "r"]


def test_another_order():
    model = parse("g (float[2] x) => (float[2] y) { a = Relu (x) y = Relu (x) }")
    nodes = ListedNodes(model)
    assert names(nodes.of([RELU])) == ["a", "y"]
    first, _ = model.graph
    model.graph.remove(first)
    model.graph.append(first)
    with checked(), pytest.raises(AssertionError, match="not those of the model"):
        nodes.of([RELU])
    nodes.forget()
    assert names(nodes.of([RELU])) == ["y", "a"]


class Drop(RewriteRuleClassBase):
    def pattern(self, op, x):
        return op.Neg(op.Neg(x))

    def rewrite(self, op, x):
        return op.Identity(x)


class Unneg(RewriteRuleClassBase):
    """A negation -> a product."""

    def pattern(self, op, x):
        return op.Neg(x)

    def rewrite(self, op, x):
        return op.Mul(x, op.initializer(ir.tensor([-1.0], name="minus")))


class Choose(RewriteRuleClassBase):
    """If -> another operator: its bodies go, with the nodes in them."""

    def pattern(self, op, condition):
        return op.If(condition, _outputs=["chosen"])

    def rewrite(self, op, condition, chosen):
        return op.Relu(chosen.graph.inputs[0])


def test_bodies_that_go_and_nodes_that_come_are_followed():
    model = parse(TEXT)
    with checked():
        report = rewriter.apply(model, [Choose, Unneg, Drop], overrides={"parity.local": "none"}).report
    assert report.applied == {"choose": 1, "unneg": 1} and report.sweeps == {"rules": 2}


def test_a_sweep_that_finds_nothing_walks_over_nothing(monkeypatch):
    walks = []
    walk = listed.all_nodes
    monkeypatch.setattr(listed, "all_nodes", lambda model: walks.append(1) or walk(model))
    monkeypatch.setattr(listed, "is_checked", lambda: False)  # which walks over all
    model = parse("g (float[2] x) => (float[2] y) { a = Neg (x) b = Neg (a) y = Relu (b) }")
    report = rewriter.apply(model, [Drop], overrides={"parity.local": "none"}).report
    assert report.sweeps == {"rules": 2} and report.applied == {"drop": 1}
    assert len(walks) == 1
