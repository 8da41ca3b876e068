"""What a recogniser says of values that proofs are fed is held to: what makes them is run."""

from __future__ import annotations

import re

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import rewriter
from rewriter.rules.blocks.contents import Scores
from rewriter.rules.blocks.routers import routers

TEXT = """
<ir_version: 10, opset_import: ["" : 21]>
block (float[T, 8] x) => (float[T, 8] y) {{
    logits = MatMul (x, router)
    scores = {function} (logits)
    weights, experts = TopK (scores, two)
    sum = ReduceSum (weights, last)
    normalised = Div (weights, sum)
    {experts}
    y = Add (part0, part1)
}}
"""
EXPERT = """
    is{e} = Equal (experts, number{e})
    mask{e} = Cast <to = 1> (is{e})
    slots{e} = Mul (normalised, mask{e})
    share{e} = ReduceSum (slots{e}, last)
    up{e} = MatMul (x, up_{e})
    act{e} = Relu (up{e})
    down{e} = MatMul (act{e}, down_{e})
    part{e} = Mul (down{e}, share{e})
"""


def block(function: str) -> onnx.ModelProto:
    text = TEXT.format(function=function, experts="".join(EXPERT.format(e=e) for e in range(2)))
    model = onnx.parser.parse_model(text)
    draw = np.random.default_rng(0)
    weights = {"router": (8, 2), **{f"up_{e}": (8, 16) for e in range(2)}, **{f"down_{e}": (16, 8) for e in range(2)}}
    arrays = {name: draw.standard_normal(shape, dtype=np.float32) for name, shape in weights.items()}
    arrays |= {"two": np.array([2]), "last": np.array([-1]), "number0": np.array(0), "number1": np.array(1)}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    return model


@pytest.fixture
def positive(monkeypatch):
    """A recogniser that says of the output of an operator that it is positive."""

    def claim(operator: str) -> None:
        monkeypatch.setattr(routers, "_transfers", list(routers))

        @routers.at(operator)
        def scores(facts: object, node: ir.Node, x: ir.Value) -> Scores:
            return Scores(node.outputs[0], "positive")

    return claim


@pytest.mark.parametrize("function", ["Exp", "HardSigmoid"])
def test_scores_that_are_positive_fuse(positive, function):
    positive(function)
    assert rewriter.apply(block(function), "fuse-experts").report.applied == {"fuse-experts": 1}


@pytest.mark.parametrize("function", ["Tanh", "LeakyRelu"])
def test_scores_that_are_said_to_be_positive_and_are_not_fail_the_proof(positive, function):
    positive(function)
    report = rewriter.apply(block(function), "fuse-experts").report
    assert not report.applied
    (failed,) = (decline for decline in report.declines if decline.failed)
    assert re.search("'scores' is positive, and its nodes make -", failed.reason)
