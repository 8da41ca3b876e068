"""Every shipped rule fires on the models that are drawn for it, and keeps its promises on them."""

from __future__ import annotations

import pytest
from hypothesis import settings
from rule_models import MODELS, RULES, rule_of
from support import histogram
from test_strategies import drawn

from rewriter.operators.form import form_of
from rewriter.operators.operator import input_at
from rewriter.operators.qmoe import ROUTER_WEIGHTS
from rewriter.ruleset.discover import rule_offers
from rewriter.testing import check_model, check_rule, moe_nodes, quantized_experts

ONE_QMOE = {"operators": ["QMoE"], "obstacles": [], "placements": ["main"], "max_layers": 1}
FEW = settings(max_examples=12, derandomize=True, database=None)


def test_every_shipped_rule_has_models():
    assert MODELS.keys() == {name for name, offer in rule_offers().items() if offer.package == "rewriter.rules"}
    assert RULES.keys() <= MODELS.keys()


@pytest.mark.parametrize("name", MODELS)
def test_it_fires_and_keeps_its_promises(name):
    check_rule(rule_of(name), MODELS[name], settings=FEW)


def test_a_quantized_node_that_cannot_be_judged_is_left_as_it_was():
    strategy = moe_nodes(activations=["relu-fc3"], layouts=["raw"], **ONE_QMOE)
    report = check_model(rule_of("qmoe-to-moe"), drawn(strategy, lambda model: True))
    assert "nothing can be proved" in report.declines[0].reason


def test_what_a_runtime_runs_wrongly_is_no_judge():
    def sparse(model):
        (node,) = (node for node in model.graph if node.op_type == "QMoE")
        return form_of(node).sparse_mixer and input_at(node, ROUTER_WEIGHTS) is None

    strategy = moe_nodes(activations=["relu"], layouts=["raw"], **ONE_QMOE)
    report = check_model("qmoe-to-moe", drawn(strategy, sparse))
    assert "the reference QMoE cannot run a sparse mixer" in report.declines[0].reason


def test_a_router_in_another_precision_fuses_where_the_model_declares_no_types():
    def several(model):
        return histogram(model)["MatMulNBits"] >= 6

    forms = {"dtypes": ["float16"], "typed": False, "routers": ["topk-softmax"], "bits": [4], "placements": ["main"]}
    report = check_model("fuse-experts", drawn(quantized_experts(**forms), several))
    assert report.applied == {"fuse-experts": 1}
