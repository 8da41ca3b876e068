"""What the tests of rules are given wrongly is one line that says what to write."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
from hypothesis import strategies as st

from rewriter.errors import RuleSetError, UsageError
from rewriter.rule import Rule
from rewriter.rules import unstack
from rewriter.testing import check_model, check_rule, near_misses, projections

TEXT = '<ir_version: 10, opset_import: ["" : 21]> g (float[2] x) => (float[2] y) { y = Relu (x) }'
MODEL = ir.from_onnx_text(TEXT)


class NeedsArguments(Rule):
    """A rule that its class alone does not make."""

    def __init__(self, wanted):
        super().__init__(name=wanted)


WRONG_RULES = {
    "'rule' is a function and no rule: write rule()": unstack.rule,
    "'rewriter.rules.unstack' is a module and no rule: write unstack.rule()": unstack,
    "a strategy stands where the rule should be": projections(),
    "'moe-int4' is a rule set and no rule: write rewriter.load('moe-int4')": "moe-int4",
    "unknown rule 'unstak' (did you mean 'unstack'?)": "unstak",
    "cannot make the rule: TypeError": NeedsArguments,
}
WRONG_MODELS = {
    "'projections' is a function: write projections()": projections,
    "not list: write st.sampled_from(models)": [MODEL],
    "not Model: write st.just(model)": MODEL,
    "a model is an onnx_ir.Model or its ONNX text, not int": st.integers(),
    "write ir.from_proto(model)": st.just(onnx.parser.parse_model(TEXT)),
}
WRONG_TEXTS = {
    "this is no model as ONNX text: [ParseError": "model.onnx",
    "not int": 3,
}


def refused(message, call):
    with pytest.raises((UsageError, RuleSetError)) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("holds", [check_rule, near_misses])
@pytest.mark.parametrize("message", WRONG_RULES)
def test_what_is_no_rule(holds, message):
    refused(message, lambda: holds(WRONG_RULES[message], st.just(MODEL)))


@pytest.mark.parametrize("holds", [check_rule, near_misses])
@pytest.mark.parametrize("message", WRONG_MODELS)
def test_what_draws_no_models(holds, message):
    refused(message, lambda: holds("unstack", WRONG_MODELS[message]))


@pytest.mark.parametrize("message", WRONG_TEXTS)
def test_what_is_no_model(message):
    refused(message, lambda: check_model("unstack", WRONG_TEXTS[message]))


def test_a_rule_whose_set_has_its_name_is_a_rule():
    assert not check_model("unstack", TEXT).applied
