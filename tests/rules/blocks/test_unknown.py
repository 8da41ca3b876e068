"""Why a value is no expert's output: what is at fault may be behind a linear that looks like one of other tokens."""

from __future__ import annotations

from stated import CHOICE, facts_of

from rewriter.rules.blocks.unknown import why_unknown

ROWS = f"{CHOICE} m = Equal (i, one) c = NonZero (m) t = Gather (c, zero) g = Gather (x, t)"


def test_a_first_linear_whose_weight_is_computed():
    facts, y = facts_of(f"{ROWS} w = Add (gate, gate) h = MatMul (g, w) a = Relu (h) y = MatMul (a, down)")
    node = y.producer()
    reason, culprit = why_unknown(facts, y, node)
    assert "a weight is computed from constants" in reason and culprit.outputs[0].name == "h"
