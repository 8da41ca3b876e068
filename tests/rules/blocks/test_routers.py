"""Recognisers of routers by themselves: what each states of a few operators, from the text of a graph."""

from __future__ import annotations

import pytest
from stated import facts_of

from rewriter.rules.blocks.axes import Located
from rewriter.rules.blocks.contents import Composed, Scores
from rewriter.rules.blocks.mixing import Chosen, Mixing


def stated(body, kind):
    """What is stated of ``y``, and why nothing is."""
    facts, y = facts_of(body)
    return facts.get(y, kind), facts.why_not(y)


@pytest.mark.parametrize(
    ("body", "function"),
    [
        ("y = Softmax (r)", "softmax"),
        ("y = Sigmoid (r)", "sigmoid"),
        ("y = Exp (r)", "positive"),
        ("y = Softplus (r)", "positive"),
        ("a = Softplus (r) y = Sqrt (a)", "positive"),
    ],
)
def test_scores(body, function):
    scores, _ = stated(body, Scores)
    assert scores.function == function


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("y = Tanh (r)", "tanh(x)"),
        ("a = Tanh (r) y = Abs (a)", "abs(tanh(x))"),
        ("a = Relu (r) q = Mul (a, a) y = Add (q, half)", "add(mul(relu(x), relu(x)), 0.5)"),
        ("a = Relu (r) y = Cast <to = 1> (a)", "relu(x)"),
        ("a = Add (r, half) y = Identity (a)", None),  # known functions and sums of logits need no name
    ],
)
def test_a_function_without_a_name_travels_on(body, text):
    composed, _ = stated(body, Composed)
    assert (composed and composed.text) == text


def test_a_long_name_is_cut():
    chain = " ".join(f"a{n + 1} = Mul (a{n}, a{n})" for n in range(200))
    composed, _ = stated(f"a0 = Tanh (r) {chain} y = Identity (a200)", Composed)
    assert "..." in composed.text and len(composed.text) < 300


def test_the_root_of_logits_and_a_softmax_over_tokens_are_none():
    assert stated("y = Sqrt (r)", Scores)[0] is None
    assert stated("y = Softmax <axis = 0> (r)", Scores)[0] is None


def test_a_choice_is_of_a_router_and_its_values_are_weights():
    located, _ = stated("s = Softmax (r) v, y = TopK (s, k)", Located)
    assert isinstance(located.content, Chosen)
    router = located.content.router
    assert (router.k, router.experts, router.scores.function, router.fault) == (2, 4, "softmax", "")
    located, _ = stated("s = Softmax (r) y, i = TopK (s, k)", Located)
    assert isinstance(located.content, Mixing) and located.content.stage == "raw"


@pytest.mark.parametrize(
    ("body", "stage"),
    [
        ("v, i = TopK (r, k) y = Softmax (v)", "softmax"),
        ("s = Exp (r) v, i = TopK (s, k) y = Softmax (v)", "softmax"),
        ("s = Exp (r) v, i = TopK (s, k) t = ReduceSum (v, last) y = Div (v, t)", "normalised"),
    ],
)
def test_weights_of_the_chosen(body, stage):
    located, _ = stated(body, Located)
    assert isinstance(located.content, Mixing) and located.content.stage == stage


def test_a_softmax_of_probabilities_says_why_it_is_none():
    located, why = stated("s = Softmax (r) v, i = TopK (s, k) y = Softmax (v)", Located)
    assert (located, why) == (None, "Softmax over chosen weights that are no logits")
