"""tie-quantized-embedding: an embedding and its output projection as one quantized table."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from embedding_models import (
    MODELS,
    assert_close,
    exported,
    graph_of,
    histogram,
    initializer,
    nodes,
    normal,
    quantized,
    recorded,
    rule_set,
    run,
    with_weights,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

import rewriter
from rewriter.errors import ParityError
from rewriter.graph.contents import total_bytes
from rewriter.rules import tie_quantized_embedding as rule_module
from rewriter.rules.tie_quantized_embedding import TieQuantizedEmbedding

NAME = "tie-quantized-embedding"
GATHER = "gather-to-gather-block-quantized"
MATMUL = "matmul-to-matmul-nbits"

TIED = {  # model -> its table, and whether it is stored [H, V]
    "genai/llama_tied_fp32_cpu": ("lm_head.MatMul.weight", True),
    "genai/llama_tied_fp16_cuda": ("lm_head.MatMul.weight", True),
    "mobius/llama_tied_dense_f32": ("model.embed_tokens.weight", False),
}


def tie(form="blocks"):
    return {NAME: {"form": form}}


def dequantized(model, table, by_columns, **spec):
    stored = initializer(model, table)
    rows = quantized(stored.T if by_columns else stored, **spec)
    return with_weights(model, {table: rows.T if by_columns else rows})


@pytest.mark.parametrize("form", ["blocks", "flat"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", TIED)
def test_exported_models_keep_one_table(name, bits, symmetric, form):
    model = exported(name)
    spec = {"bits": bits, "block_size": 32, "symmetric": symmetric}
    result = rewriter.apply(model, rule_set(tie(form), **spec))
    got = result.model
    assert result.report.applied == {NAME: 1} and not result.report.declines
    (proof,) = result.report.proofs
    assert proof.runtime == "cpu" and proof.tolerance == (1e-3 if "fp16" in name else 1e-5)

    (head,) = [n for n in got.graph.node if n.op_type == "MatMulNBits"]
    (lookup,) = [n for n in got.graph.node if n.op_type == "GatherBlockQuantized"]
    producers = {out: n for n in got.graph.node for out in n.output}
    table = lookup.input[0] if form == "blocks" else producers[lookup.input[0]].input[0]
    assert table == head.input[1]
    assert TIED[name][0] not in {t.name for t in got.graph.initializer}
    (weight,) = result.report.weights
    assert (weight.role, weight.shape, weight.bits) == ("lm_head", (512, 64), bits)

    feeds, _ = recorded(name)
    tolerance = 2e-3 if "fp16" in name else 1e-5
    assert_close(run(got, feeds), run(dequantized(model, *TIED[name], **spec), feeds), tolerance)
    assert not rewriter.apply(got, rule_set(tie(form), **spec)).report.applied


def test_the_new_head_is_still_the_head(monkeypatch):
    made, rewrite = [], TieQuantizedEmbedding.rewrite
    monkeypatch.setattr(TieQuantizedEmbedding, "rewrite", lambda *a, **k: made.append(rewrite(*a, **k)) or made[-1])
    rewriter.apply(exported(next(iter(TIED))), rule_set(tie("blocks"), bits=4, block_size=32))
    roles = {value.producer().op_type: role for value, role in made[0].roles.items()}
    assert roles == {"MatMulNBits": "lm_head"}  # the lookup has the role of the one that it replaces


@pytest.mark.parametrize("name", TIED)
@pytest.mark.parametrize("set_name", ["rtn", "rtn-last", "k-quant", "k-quant-last", "k-quant-mixed"])
def test_shipped_plans_give_the_shared_table_the_bits_of_the_head(name, set_name):
    phases = [{"name": "tie", "rules": [NAME]}]
    result = rewriter.apply(exported(name), {"extends": set_name, "phases": phases, "parity": {"local": "all"}})
    got = result.model
    assert result.report.applied[NAME] == 1 and histogram(got)["GatherBlockQuantized"] == 1
    head = next(w for w in result.report.weights if w.role == "lm_head")
    eight = set_name not in ("rtn", "k-quant")
    assert (head.bits, head.algorithm) == (8 if eight else 4, set_name.partition("-l")[0].partition("-m")[0])
    more = {(w.role, w.layer) for w in result.report.weights if w.bits == 8} - {("lm_head", None)}
    roles = ("attention.v", "attention.qkv", "mlp.down")
    second = {(w.role, w.layer) for w in result.report.weights if w.role in roles and w.layer == 1}
    assert more == (second if set_name == "k-quant-mixed" else set())
    run(got, recorded(name)[0])


@pytest.mark.parametrize(
    ("theirs", "algorithm", "symmetric"),
    [
        ("genai/llama_tied_int4_cpu_shared", "rtn", True),
        ("genai/llama_tied_int4_cpu_shared_kquant", "k-quant", False),
    ],
)
def test_no_larger_than_what_the_builder_writes(theirs, algorithm, symmetric):
    def bytes_of(form):
        rules = rule_set(tie(form), GATHER, MATMUL, algorithm=algorithm, symmetric=symmetric, block_size=32)
        return total_bytes(rewriter.apply(exported("genai/llama_tied_fp32_cpu"), rules).ir_model)

    builder = total_bytes(rewriter.io.load(MODELS / f"{theirs}.onnx"))
    zero_points = 0 if symmetric else 512 * 2
    shapes = 2 * 8  # one dimension more, and the shape of the scales, than the builder's single Reshape
    assert bytes_of("flat") <= builder
    assert bytes_of("blocks") <= builder + zero_points + shapes + 3 * 8


def untied(name, change=0.0):
    """The model with a second, equal copy of the table in the place of the Transpose between them."""
    model = exported(name)
    transpose = next(n for n in model.graph.node if n.op_type == "Transpose" and n.input[0] == TIED[name][0])
    second = initializer(model, TIED[name][0]).T.copy()
    second[-1, -1] += change
    model.graph.initializer.append(numpy_helper.from_array(second, "second"))
    for node in model.graph.node:
        node.input[:] = ["second" if i == transpose.output[0] else i for i in node.input]
    model.graph.node.remove(transpose)
    return model


@pytest.mark.parametrize("name", TIED)
def test_two_equal_tables_become_one(name):
    spec = {"bits": 4, "block_size": 32, "symmetric": False}
    result = rewriter.apply(untied(name), rule_set(tie(), **spec))
    assert result.report.applied == {NAME: 1}
    assert {"second", TIED[name][0]}.isdisjoint(t.name for t in result.model.graph.initializer)
    feeds, _ = recorded(name)
    wanted = run(dequantized(exported(name), *TIED[name], **spec), feeds)
    assert_close(run(result.model, feeds), wanted, 2e-3 if "fp16" in name else 1e-5)


@pytest.mark.parametrize("name", TIED)
def test_unequal_tables_stay_apart_and_the_report_says_so(name):
    model = untied(name, change=1.0)
    result = rewriter.apply(model, rule_set(tie()))
    assert not result.report.applied and nodes(result.model) == nodes(model)
    (decline,) = result.report.declines
    assert "not tied" in decline.reason and "not equal" in decline.reason and "'second'" in decline.reason


HEAD = "agraph (int64[b, s] ids) => (float[b, s, 50] y) {{ {} }}"
LINEAR = "agraph (int64[s] ids) => (float[s, 50] y) {{ {} }}"


@pytest.mark.parametrize(
    ("text", "linears", "added"),
    [
        (HEAD.format("e = Gather(w, ids) h = Relu(e) t = Transpose(w) y = MatMul(h, t)"), 1, 0),
        (HEAD.format("v = Transpose<perm = [1, 0]>(t) e = Gather(v, ids) h = Relu(e) y = MatMul(h, t)"), 1, 0),
        (LINEAR.format("e = Gather(w, ids) h = Relu(e) y = Gemm<transB = 1>(h, w)"), 1, 0),
        (LINEAR.format("e = Gather(w, ids) h = Relu(e) y = Gemm<transB = 1>(h, w, c)"), 1, 0),
        (LINEAR.format("e = Gather(w, ids) h = Relu(e) y = Gemm<transB = 1>(h, w, s)"), 1, 1),
        (LINEAR.format("e = Gather(w, ids) f = Gather(w, ids) h = Mul(e, f) y = Gemm<transB = 1>(h, w)"), 1, 0),
        (HEAD.format("e = Gather(w, ids) h = Relu(e) t = Transpose(w) p = MatMul(h, t) q = MatMul(e, t) y = Add(p, q)"),
         2, 1),
    ],
)  # fmt: skip
def test_spellings(text, linears, added):
    weights = {"c": normal(50, seed=1), "s": normal(1, seed=2)}
    table = normal(50, 64)
    named = {"w": table} if "(w" in text else {"t": np.ascontiguousarray(table.T)}
    used = {k: v for k, v in weights.items() if f", {k})" in text}
    model = graph_of(text, named | used)
    spec = {"bits": 4, "block_size": 16, "symmetric": False}
    result = rewriter.apply(model, rule_set(tie(), **spec))
    assert result.report.applied == {NAME: 1}
    ours = histogram(result.model)
    assert (ours["MatMulNBits"], ours["Add"], ours["MatMul"] + ours["Gemm"]) == (linears, added, 0)
    ids = np.array([[0, 7], [49, 3]]) if "b, s" in text else np.array([0, 7, 49])
    name = next(iter(named))
    assert_close(run(result.model, {"ids": ids}), run(dequantized(model, name, name == "t", **spec), {"ids": ids}))


@pytest.mark.parametrize(
    ("reason", "body", "plan"),
    [
        ("Neg also reads it", "e = Gather(w, ids) n = Neg(w) y = Gemm<transB = 1>(e, w, n)", {}),
        ("alpha is 2.0", "e = Gather(w, ids) y = Gemm<transB = 1, alpha = 2.0>(e, w)", {}),
        ("beta is 2.0", "e = Gather(w, ids) y = Gemm<transB = 1, beta = 2.0>(e, w, c)", {}),
        ("transA is set", "e = Gather(w, ids) y = Gemm<transB = 1, transA = 1>(e, w)", {}),
        ("excluded by the plan (role embedding)", "e = Gather(w, ids) h = Relu(e) y = Gemm<transB = 1>(h, w)",
         {"exclude": [{"role": "embedding"}]}),
        ("excluded by the plan (role lm_head)", "e = Gather(w, ids) h = Relu(e) y = Gemm<transB = 1>(h, w)",
         {"exclude": [{"role": "lm_head"}]}),
        ("not divisible by the block", "e = Gather(w, ids) h = Relu(e) y = Gemm<transB = 1>(h, w)",
         {"block_size": 128}),
        ("fewer than min_bytes", "e = Gather(w, ids) h = Relu(e) y = Gemm<transB = 1>(h, w)", {"min_bytes": 99999}),
        ("graph output", "e = Gather(w, ids) h = Relu(e) v = Identity(w) y = Gemm<transB = 1>(h, w)", {}),
    ],
)  # fmt: skip
def test_declines_and_leaves_the_graph(reason, body, plan):
    outputs = "float[50, 64] v, float[d, e] y" if "v = " in body else "float[d, e] y"
    text = f"agraph (int64[s] ids) => ({outputs}) {{ {body} }}"
    weights = {"w": normal(50, 64)} | ({"c": normal(50)} if ", c)" in body else {})
    model = graph_of(text, weights)
    rule = {NAME: {"min_bytes": plan.pop("min_bytes", 4096)}}
    result = rewriter.apply(model, rule_set(rule, **plan))
    assert not result.report.applied and nodes(result.model) == nodes(model)
    assert [reason in decline.reason for decline in result.report.declines] == [True]


def test_a_head_in_a_branch_is_not_tied():
    text = """agraph (bool c, int64[s] ids) => (float[s, 50] y) { e = Gather(w, ids)
        y = If (c) <
            then_branch = a () => (float[s, 50] p) { t = Transpose(w) p = MatMul(e, t) },
            else_branch = b () => (float[s, 50] q) { u = Transpose(w) v = MatMul(e, u) q = Neg(v) }
        > }"""
    result = rewriter.apply(graph_of(text, {"w": normal(50, 64)}), rule_set(tie()))
    assert not result.report.applied and "several graphs" in result.report.declines[0].reason


def test_an_embedding_without_a_head_is_left_to_its_own_rule():
    text = "agraph (int64[s] ids) => (float[s, 64] y) { y = Gather(w, ids) }"
    assert not rewriter.apply(graph_of(text, {"w": normal(50, 64)}), rule_set(tie())).report.declines


@pytest.mark.parametrize(
    ("target", "spec", "form"),
    [
        ("cpu@1.26", {}, "blocks"),
        ("cpu@1.26", {"symmetric": False}, "flat"),
        ("cpu@1.26", {"symmetric": False, "bits": 8}, "blocks"),
        ("cpu@1.27", {"symmetric": False}, "blocks"),
        ("cuda@1.31", {"symmetric": False}, "flat"),
        ("cpu@1.26", {"symmetric": False, "block_size": 64}, None),
        ("cuda@1.26", {}, None),
    ],
)
def test_the_form_is_one_that_the_target_reads(target, spec, form):
    rules = rule_set(tie(), **{"block_size": 32, "bits": 4, **spec})
    result = rewriter.apply(exported("genai/llama_tied_fp32_cpu"), rules, target=target)
    found = [n for n in result.model.graph.node if n.op_type == "GatherBlockQuantized"]
    axes = [next(a.i for a in n.attribute if a.name == "quantize_axis") for n in found]
    assert axes == {"blocks": [2], "flat": [1], None: []}[form]
    assert ["misreads" in decline.reason for decline in result.report.declines] == ([] if form else [True])


def test_a_table_that_a_caller_may_override_is_no_constant():
    model = graph_of(LINEAR.format("e = Gather(w, ids) y = Gemm<transB = 1>(e, w)"), {"w": normal(50, 64)})
    model.graph.input.append(onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [50, 64]))
    assert not rewriter.apply(model, rule_set(tie())).report.applied


def test_a_wrong_rule_is_caught(monkeypatch):
    right = rule_module.gather

    def wrong(op, data, ids, others, **sizes):
        return right(op, data, op.Abs(op.Sub(ids, op.Constant(value_int=1))), others, **sizes)

    monkeypatch.setattr(rule_module, "gather", wrong)
    with pytest.raises(ParityError, match=NAME):
        rewriter.apply(exported("genai/llama_tied_fp32_cpu"), rule_set(tie()), strict=True)


@settings(max_examples=20, deadline=None)
@given(
    vocabulary=st.integers(1, 90),
    hidden=st.sampled_from([16, 32, 48, 64]),
    bits=st.sampled_from([2, 4, 8]),
    block=st.sampled_from([0, 16, 32, 64]),
    symmetric=st.booleans(),
    form=st.sampled_from(["blocks", "flat"]),
    apart=st.booleans(),
    equal=st.booleans(),
)
def test_fires_with_parity_or_declines(vocabulary, hidden, bits, block, symmetric, form, apart, equal):
    table = normal(vocabulary, hidden)
    other = table if equal else normal(vocabulary, hidden, seed=1)
    body = "e = Gather(w, ids) h = Relu(e) t = Transpose(w) y = MatMul(h, t)"
    weights = {"w": table}
    if apart:
        body, weights = "e = Gather(w, ids) h = Relu(e) y = MatMul(h, t)", weights | {"t": np.array(other.T, order="C")}
    model = graph_of(f"agraph (int64[b, s] ids) => (float[b, s, v] y) {{ {body} }}", weights)
    spec = {"bits": bits, "block_size": block, "symmetric": symmetric}
    result = rewriter.apply(model, rule_set({NAME: {"form": form, "min_bytes": 0}}, **spec))
    block = block or max(longest for longest in (16, 32, 64) if hidden % longest == 0)  # for a whole row there is none
    assert bool(result.report.applied) == (hidden % block == 0 and (equal or not apart))
    assert bool(result.report.applied) != bool(result.report.declines)
    if result.report.applied:
        rows = quantized(table, **spec | {"block_size": block})
        change = {"w": rows} | ({"t": rows.T} if apart else {})
        feeds = {"ids": np.random.default_rng(0).integers(0, vocabulary, (2, 3))}
        assert_close(run(result.model, feeds), run(with_weights(model, change), feeds))
