"""share-tied-embedding: one float table where a model stores two equal ones."""

from __future__ import annotations

import numpy as np
import pytest
from embedding_models import assert_close, exported, graph_of, histogram, nodes, normal, recorded, rule_set, run
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tie_quantized_embedding import TIED, untied

import rewriter
from rewriter.errors import ParityError
from rewriter.rules import share_tied_embedding as rule_module

NAME = "share-tied-embedding"


@pytest.mark.parametrize("name", TIED)
def test_two_equal_tables_become_one(name):
    model = untied(name)
    result = rewriter.apply(model, rule_set(NAME))
    assert result.report.applied == {NAME: 1}
    assert histogram(result.model) == histogram(exported(name))
    assert result.report.bytes_before - result.report.bytes_after == (65536 if "fp16" in name else 131072)
    feeds, outputs = recorded(name)
    assert_close(run(result.model, feeds), run(model, feeds), 0.0)
    assert_close(run(result.model, feeds), outputs, 1e-2 if "fp16" in name else 1e-5)
    assert not rewriter.apply(result.model, rule_set(NAME)).report.applied


@pytest.mark.parametrize("name", TIED)
def test_unequal_tables_stay_apart_and_the_report_says_so(name):
    model = untied(name, change=1.0)
    result = rewriter.apply(model, rule_set(NAME))
    assert not result.report.applied and nodes(result.model) == nodes(model)
    assert "not equal" in result.report.declines[0].reason


@pytest.mark.parametrize("name", TIED)
def test_a_model_that_shares_its_table_is_left_alone(name):
    result = rewriter.apply(exported(name), rule_set(NAME))
    assert not result.report.applied and not result.report.declines


@pytest.mark.parametrize(
    ("head", "transposed", "operators"),
    [
        ("y = MatMul(h, t)", True, {"Gather": 1, "Relu": 1, "Transpose": 1, "MatMul": 1}),
        ("y = Gemm(h, t)", True, {"Gather": 1, "Relu": 1, "Transpose": 1, "Gemm": 1}),
        ("y = Gemm<transB = 1, alpha = 0.5>(h, t)", False, {"Gather": 1, "Relu": 1, "Gemm": 1}),
        ("v = Transpose(t) y = MatMul(h, v)", False, {"Gather": 1, "Relu": 1, "Transpose": 1, "MatMul": 1}),
    ],
)
def test_spellings(head, transposed, operators):
    table = normal(50, 64)
    second = np.array(table.T if transposed else table, order="C")
    model = graph_of(
        f"agraph (int64[s] ids) => (float[s, v] y) {{ e = Gather(w, ids) h = Relu(e) {head} }}",
        {"w": table, "t": second},
    )
    result = rewriter.apply(model, rule_set(NAME))
    assert result.report.applied == {NAME: 1} and histogram(result.model) == operators
    assert [t.name for t in result.model.graph.initializer] == ["w"]
    feeds = {"ids": np.array([3, 49])}
    assert_close(run(result.model, feeds), run(model, feeds))


def test_a_wrong_rule_is_caught(monkeypatch):
    rule = rule_module.ShareTiedEmbedding
    monkeypatch.setattr(rule, "rewrite", _doubled(rule.rewrite))
    with pytest.raises(ParityError, match=NAME):
        rewriter.apply(untied("genai/llama_tied_fp32_cpu"), rule_set(NAME), strict=True)


def _doubled(rewrite):
    def wrong(self, op, **bound):
        return {old: op.Add(new, new) for old, new in rewrite(self, op, **bound).items()}

    return wrong


@settings(max_examples=15, deadline=None)
@given(vocabulary=st.integers(1, 60), hidden=st.integers(1, 40), other=st.integers(0, 3), half=st.booleans())
def test_fires_with_parity_or_declines(vocabulary, hidden, other, half):
    dtype = np.float16 if half else np.float32
    table, second = normal(vocabulary, hidden, dtype=dtype), normal(vocabulary, hidden, seed=other, dtype=dtype)
    kind = "float16" if half else "float"
    model = graph_of(
        f"agraph (int64[b, s] ids) => ({kind}[b, s, v] y) {{ e = Gather(w, ids) y = MatMul(e, t) }}",
        {"w": table, "t": np.array(second.T, order="C")},
    )
    result = rewriter.apply(model, rule_set({NAME: {"min_bytes": 0}}))
    assert bool(result.report.applied) == np.array_equal(table, second)
    assert bool(result.report.applied) != bool(result.report.declines)
    feeds = {"ids": np.zeros((2, 3), np.int64)}
    assert_close(run(result.model, feeds), run(model, feeds), 1e-3 if half else 1e-6)
