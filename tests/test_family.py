"""Recognisers as functions: which nodes a function is asked about, what it states, and how it is named at fault."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from support import parse

from rewriter.errors import RewriterWarning, RuleError
from rewriter.facts import Facts, Family, agreed, outside
from rewriter.rule import Declined


@dataclass(frozen=True)
class Seen:
    inputs: tuple[str, ...]


def names(*values):
    return tuple(value.name if value is not None else "-" for value in values)


def stated(graph, family, **given):
    model = parse(graph, **given)
    facts = Facts(model, family)
    facts.compute()
    return {v.name: fact.inputs for n in model.graph for v in n.outputs if (fact := facts.get(v, Seen)) is not None}


def test_a_function_is_asked_at_each_of_its_operators_with_the_inputs_that_it_names():
    family = Family("letters")

    @family.at("Neg", "Abs")
    def unary(facts, node, x):
        return Seen(names(x))

    graph = "g (float[2] x) => (float[2] c) { a = Neg (x) b = Abs (a) c = Relu (b) }"
    assert stated(graph, family) == {"a": ("x",), "b": ("a",)}


def test_a_node_with_other_inputs_is_none_that_the_function_is_asked_about():
    family = Family("letters")

    @family.at("Clip")
    def bounded(facts, node, x, low):
        return Seen(names(x, low))

    graph = """g (float[2] x, float l, float h) => (float[2] d) {
        a = Clip (x) b = Clip (x, l) c = Clip (x, l, h) d = Clip (x, "", h) }"""
    assert stated(graph, family) == {"b": ("x", "l")}


def test_an_input_with_a_default_may_be_absent_and_others_take_the_rest():
    family = Family("letters")

    @family.at("Clip")
    def bounded(facts, node, x, low=None, high=None):
        return Seen(names(x, low, high))

    @family.at("Concat")
    def joined(facts, node, first, *others):
        return Seen(names(first, *others))

    graph = """g (float[2] x, float l, float h) => (float[6] d) {
        a = Clip (x, l) b = Clip (x, "", h) d = Concat <axis = 0> (x, a, b) }"""
    assert stated(graph, family) == {"a": ("x", "l", "-"), "b": ("x", "-", "h"), "d": ("x", "a", "b")}


def test_a_function_may_state_a_fact_for_each_output():
    family = Family("letters")

    @family.at("Split")
    def parts(facts, node, x):
        return {out: Seen((str(i),)) for i, out in enumerate(node.outputs)}

    assert stated("g (float[2] x) => (float[1] a, float[1] b) { a, b = Split (x) }", family) == {
        "a": ("0",),
        "b": ("1",),
    }


def test_another_domain_is_another_operator():
    family = Family("letters")

    @family.at("Gelu", domain="com.microsoft")
    def gelu(facts, node, x):
        return Seen(names(x))

    graph = "g (float[2] x) => (float[2] b) { a = com.microsoft.Gelu (x) b = Gelu (a) }"
    assert stated(graph, family, domains=', "com.microsoft" : 1') == {"a": ("x",)}


def test_a_function_at_fault_is_named_with_its_family():
    family = Family("letters")

    @family.at("Relu")
    def halved(facts, node, x):
        return 1 // 0

    with pytest.raises(RuleError, match=r"letters\.halved.* at node r: ZeroDivisionError"):
        stated("g (float[2] x) => (float[2] y) { [r] y = Relu (x) }", family)


def test_why_a_function_stated_nothing_is_kept():
    family = Family("letters")

    @family.at("Relu")
    def near(facts, node, x):
        raise Declined("almost", node, remedy="try harder")

    model = parse("g (float[2] x) => (float[2] y) { y = Relu (x) }")
    facts = Facts(model, family)
    facts.compute()
    why = facts.why_not(model.graph.outputs[0])
    assert (why, why.remedy) == ("almost", "try harder")


def two_opinions(**given):
    family = Family("letters")

    @family.at("Relu")
    def first(facts, node, x):
        return Seen(("first",))

    @family.at("Relu", **given)
    def second(facts, node, x):
        return Seen(("second",))

    return stated("g (float[2] x) => (float[2] y) { [r] y = Relu (x) }", family)


def test_two_recognisers_that_state_different_things_of_a_value_are_at_odds():
    with agreed(), pytest.raises(RuleError, match=r"letters\.second.* at node r: states .*second.* of 'y', .*first"):
        two_opinions()


def test_one_may_go_before_the_other():
    with agreed():
        assert two_opinions(overrides=True) == {"y": ("second",)}


@pytest.mark.parametrize("text", ["import no_such_module", "raise SystemExit(1)"])
def test_recognisers_that_cannot_be_imported_are_left_out_with_a_warning(tmp_path, monkeypatch, text):
    (tmp_path / "broken_recognisers.py").write_text(text)
    (tmp_path / "good_recognisers.py").write_text("")
    entries = [SimpleNamespace(value=name) for name in ("broken_recognisers", "good_recognisers")]
    monkeypatch.setattr(outside, "metadata", SimpleNamespace(entry_points=lambda *, group: entries))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(RewriterWarning, match="recognisers of 'broken_recognisers' are left out: it cannot be imported"):
        assert outside.load_recognisers.__wrapped__() == ("good_recognisers",)


def test_a_function_that_no_node_could_be_given_to_is_refused():
    family = Family("letters")
    with pytest.raises(TypeError, match="half names 1 inputs after facts and node, and Div has 2"):

        @family.at("Div")
        def half(facts, node, x):
            return Seen(names(x))

    with pytest.raises(TypeError, match="both names 2 inputs after facts and node, and Relu has at most 1"):

        @family.at("Relu")
        def both(facts, node, x, y):
            return Seen(names(x, y))
