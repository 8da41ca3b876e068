"""Hits by themselves: where an expert was chosen, what lies there, and the way back."""

from __future__ import annotations

from stated import CHOICE, PLAIN, held, kinds, stated

from rewriter.facts.size import Integers
from rewriter.rules.blocks.contents import Tokens
from rewriter.rules.blocks.hits import Hit, Hits
from rewriter.rules.blocks.mixing import Share

HITS = f"{CHOICE} m = Equal (i, one) c = NonZero (m) t = Gather (c, zero) s = Gather (c, one)"
"""Tokens and slots where expert 1 was chosen."""
ROWS = f"{HITS} g = Gather (x, t) {PLAIN.replace('(x, gate)', '(g, gate)')}"
WEIGHTS = "c2_ = Transpose (c) w = GatherND (v, c2_) u = Unsqueeze (w, last)"
BACK = f"{ROWS} {WEIGHTS} p1 = Mul (o, u) z = Shape (x) e = ConstantOfShape (z) j = Unsqueeze (t, last)"


def test_where_an_expert_was_chosen():
    found = held(HITS.replace(" c = ", " y = ").partition(" t = ")[0])
    assert isinstance(found, Hits) and (found.expert, found.slots) == (1, {0, 1})
    token = held(f"{HITS} y = Identity (t)")
    assert isinstance(token, Hit) and token.along[0].kind == "token"
    assert held(f"{HITS} y = Identity (s)").along[0].kind == "slot"
    assert held(f"{CHOICE} m = Greater (v, b) y = NonZero (m)") is None


def test_what_lies_there():
    assert isinstance(held(f"{HITS} y = Gather (x, t)"), Tokens)
    assert kinds(f"{HITS} y = Gather (x, t)") == [("group",), ("feature",)]
    share = held(f"{HITS} {WEIGHTS} y = Identity (w)")
    assert isinstance(share, Share) and (share.expert, share.slots) == (1, {0, 1})
    assert held(f"{HITS} y = Gather (v, t)") is None  # a token's weights, of both slots


def test_what_lies_there_where_a_token_has_one_expert():
    only = HITS.replace("(p, k)", "(p, second)")
    flat = "f = Flatten (v) q = Mul (t, one) n = Add (q, s)"  # TorchScript's w[t, s]
    for body in ("y = Gather (v, t)", "u = Unsqueeze (t, last) y = GatherND (v, u)", f"{flat} y = Gather (f, n)"):
        share = held(f"{only} {body}")
        assert isinstance(share, Share) and (share.expert, share.slots) == (1, {0})
        assert kinds(f"{only} {body}") == [("group",), ()]


def test_rows_of_a_linear_are_tokens_of_the_experts_behind():
    latent = held(f"{HITS} h = MatMul (x, gate) y = Gather (h, t)")
    assert isinstance(latent, Tokens) and latent.x.name == "h"
    assert not isinstance(held(f"{HITS} h = MatMul (x, gate) a = Relu (h) y = Gather (a, t)"), Tokens)


def test_flat_positions():
    flat = f"{HITS} q = Mul (t, two) n = Add (q, s)"
    assert [atom.kind for atom in held(f"{flat} y = Identity (n)").along] == ["token", "slot"]
    assert held(f"{HITS} q = Mul (t, three) y = Add (q, s)") is None


def test_the_shape_of_what_lies_there():
    sizes = stated(f"{HITS} g = Gather (x, t) y = Shape (g)", Integers).sizes
    assert [size.constant for size in sizes] == [None, 8]
