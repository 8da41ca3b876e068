"""accuracy_level as one option of a whole rule set, and of one rule against it."""

from __future__ import annotations

import numpy as np
import pytest
from block_models import Spelling, block_model
from moe_models import INTERLEAVED, attributes_of, moe_model, nodes_of, rule_set

import rewriter
from rewriter.errors import RuleSetError

TARGET = "cpu@1.31"
EXPERTS = Spelling(weights="gather", hidden=32, inter=32)


def levels(model, rules, **overrides):
    """The rewritten model's operators that have the attribute, each with its value; 0 where it is absent."""
    result = rewriter.apply(model, rules, target=TARGET, overrides=overrides)
    found = {op: nodes_of(result.model, op) for op in ("QMoE", "MatMulNBits")}
    got = {op: {attributes_of(n).get("accuracy_level", 0) for n in nodes} for op, nodes in found.items() if nodes}
    return got, result


def test_one_option_is_of_every_operator_that_is_written():
    model = block_model(Spelling(weights="gather", hidden=32, inter=32, shared=True))
    assert levels(model, "moe-int4")[0] == {"QMoE": {0}, "MatMulNBits": {0}}
    got, result = levels(model, "moe-int4", accuracy_level=4)
    assert got == {"QMoE": {4}, "MatMulNBits": {4}}
    assert result.report.rules.activations == {"rounded_activations": False, "accuracy_level": 4}
    assert all(proof.runtime == "reference" for proof in result.report.proofs if "to-" in proof.rule)


def test_a_rules_own_option_wins():
    model = block_model(Spelling(weights="gather", hidden=32, inter=32, shared=True))
    own = {"options.moe-to-qmoe.accuracy_level": 0, "accuracy_level": 4}
    assert levels(model, "moe-int4", **own)[0] == {"QMoE": {0}, "MatMulNBits": {4}}
    own = {"options.matmul-to-matmul-nbits.accuracy_level": 4}
    assert levels(model, "moe-int4", **own)[0] == {"QMoE": {0}, "MatMulNBits": {4}}


def test_level_4_accepts_what_rounds_by_itself():
    """8 bits in blocks: without it the experts stay apart, since QMoE rounds their activations whatever it is told."""
    assert "QMoE" not in levels(block_model(EXPERTS), "moe-int8")[0]
    assert levels(block_model(EXPERTS), "moe-int8", accuracy_level=4)[0]["QMoE"] == {4}
    assert "QMoE" not in levels(block_model(EXPERTS), "moe-int8", accuracy_level=1)[0]


def test_a_target_that_has_no_such_attribute_gets_none():
    model = moe_model(INTERLEAVED, dtype=np.float32)
    rules = rule_set(["moe-to-qmoe"], bits=4) | {"accuracy_level": 4}
    node = nodes_of(rewriter.apply(model, rules, target="cpu@1.30").model, "QMoE")[0]
    assert "accuracy_level" not in attributes_of(node)


@pytest.mark.parametrize("value", [5, True, "4"])
def test_a_level_that_there_is_none_of_is_said(value):
    with pytest.raises(RuleSetError, match="accuracy_level"):
        levels(block_model(EXPERTS), rule_set(["moe-to-qmoe"], bits=4) | {"accuracy_level": value})
