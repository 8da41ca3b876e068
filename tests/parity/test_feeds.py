"""What a proof is fed: rows enough for every expert to have a part in it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from rewriter.engine.proposal import Rewrite
from rewriter.parity.subgraph_inputs import random_feeds
from rewriter.rule import Fed


def value(name, *dims):
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(dims))


def fed_to_an_moe(experts, k, *lead):
    x, logits = value("x", *lead, 16), value("logits", "rows", experts)
    stacks = [value("fc1", experts, 24, 16), None, value("fc2", experts, 16, 24)]
    node = ir.node("MoE", [x, logits, *stacks], {"k": k}, domain="com.microsoft")
    rewrite = Rewrite("rule", ir.Graph([], [], nodes=[node]), node, [node], {}, [], [], {}, {})
    return random_feeds({x: "x", logits: "logits"}, np.random.default_rng(0), rewrite)


def chosen(logits, k):
    return set(np.argsort(logits.reshape(-1, logits.shape[-1]))[:, -k:].reshape(-1).tolist())


@pytest.mark.parametrize(("experts", "k"), [(1, 1), (4, 2), (32, 1), (128, 8), (7, 3)])
@pytest.mark.parametrize("lead", [("T",), ("B", "S"), (None,), (1, "S")])
def test_every_expert_is_chosen_for_some_row(experts, k, lead):
    feeds = fed_to_an_moe(experts, k, *lead)
    assert feeds["logits"].shape == (np.prod(feeds["x"].shape[:-1]), experts)
    assert chosen(feeds["logits"], k) == set(range(experts))


def test_a_known_number_of_rows_is_kept():
    feeds = fed_to_an_moe(32, 2, 3)
    assert feeds["x"].shape == (3, 16) and len(chosen(feeds["logits"], 2)) == 6


@pytest.mark.parametrize(("experts", "k"), [(4, 2), (64, 4), (64, 1)])
def test_so_it_is_where_a_rule_says_what_chooses(experts, k):
    x, logits = value("x", "T", 16), value("logits", "T", experts)
    node = ir.node("Add", [x, logits])
    told = {
        x: Fed(ir.DataType.FLOAT, ((1, ("T",)), (16, ()))),
        logits: Fed(ir.DataType.FLOAT, ((1, ("T",)), (experts, ())), chosen=k),
    }
    rewrite = Rewrite("rule", ir.Graph([], [], nodes=[node]), node, [node], {}, [], [], {}, {}, told)
    feeds = random_feeds({x: "x", logits: "logits"}, np.random.default_rng(0), rewrite)
    assert len(feeds["x"]) == len(feeds["logits"])
    assert chosen(feeds["logits"], k) == set(range(experts))
    assert all(len(set(row)) == experts for row in feeds["logits"].tolist())
