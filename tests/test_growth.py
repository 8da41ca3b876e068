"""What is known of a value does not grow with the number of nodes before it: a chain of squares ends in seconds."""

from __future__ import annotations

import pytest
from support import parse

from rewriter.facts import Facts
from rewriter.facts.size import Integers
from rewriter.rules.blocks.axes import Located
from rewriter.rules.blocks.contents import Features
from rewriter.rules.blocks.experts import RECOGNISERS

DEEP = 200
CONSTANTS = f"<float[4, 4] w = {{{', '.join(['1'] * 16)}}}, float half = {{0.5}}, float two = {{2}}>"


def chain(first: str, step: str) -> str:
    steps = "\n".join(f"v{i + 1} = {step.replace('v', f'v{i}')}" for i in range(DEEP))
    return f"g (float[T, 4] x) => (float[T, 4] y) {CONSTANTS} {{ v0 = {first} {steps} y = Reshape (x, v{DEEP}) }}"


def facts_of(text: str) -> tuple[Facts, dict]:
    model = parse(text)
    facts = Facts(model, RECOGNISERS)
    facts.compute()
    return facts, {out.name: out for node in model.graph for out in node.outputs}


@pytest.mark.parametrize("step", ["Mul (v, v)", "Add (v, v)", "Mul (v, half)", "Relu (v)", "Pow (v, two)"])
def test_functions_of_a_linear(step):
    facts, values = facts_of(chain("MatMul (x, w)", step))
    for name in ("v1", "v100", f"v{DEEP}"):
        located = facts.get(values[name], Located)
        content = None if located is None else located.content
        assert not isinstance(content, Features) or sum(len(f.steps) + 1 for f in content.factors) < 2000


@pytest.mark.parametrize("step", ["Mul (v, v)", "Add (v, v)"])
def test_integers_of_shapes(step):
    facts, values = facts_of(chain("Shape (x)", step))
    assert facts.get(values["v1"], Integers) is not None or "Add" in step
    last = facts.get(values[f"v{DEEP}"], Integers)
    assert last is None or all(size.factor < 1 << 63 and len(size.symbols) <= 16 for size in last.sizes)
