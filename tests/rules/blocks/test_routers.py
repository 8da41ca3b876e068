"""Recognisers of routers by themselves: what each states of a few operators, from the text of a graph."""

from __future__ import annotations

import pytest
from support import parse

from rewriter.facts import Facts
from rewriter.facts.constants import constants
from rewriter.rules.blocks.axes import Located
from rewriter.rules.blocks.contents import Scores
from rewriter.rules.blocks.experts import RECOGNISERS
from rewriter.rules.blocks.mixing import Chosen, Mixing


def stated(body, kind):
    """What is stated of ``y``, in a graph of logits ``r`` [T, 4] and constants."""
    model = parse(f"""g (float[T,4] r) => (y)
        <int64[1] k = {{2}}, int64[1] last = {{-1}}, float[4] shift = {{0.1, 0.2, 0.3, 0.4}}> {{ {body} }}""")
    known = Facts(model, constants)
    known.compute()
    facts = Facts(model, RECOGNISERS, known)
    facts.compute()
    (y,) = (v for node in model.graph for v in node.outputs if v.name == "y")
    return facts.get(y, kind), facts.why_not(y)


@pytest.mark.parametrize(
    ("body", "function", "unknown"),
    [
        ("y = Softmax (r)", "softmax", ""),
        ("y = Sigmoid (r)", "sigmoid", ""),
        ("y = Exp (r)", "positive", ""),
        ("y = Softplus (r)", "positive", ""),
        ("a = Softplus (r) y = Sqrt (a)", "positive", ""),
        ("y = Tanh (r)", "logits", "tanh(x)"),
        ("a = Tanh (r) y = Abs (a)", "logits", "abs(tanh(x))"),
    ],
)
def test_scores(body, function, unknown):
    scores, _ = stated(body, Scores)
    assert (scores.function, scores.unknown) == (function, unknown)


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
