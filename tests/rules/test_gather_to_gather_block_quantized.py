"""gather-to-gather-block-quantized: embeddings, and experts that are picked at run time."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from embedding_models import (
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

import rewriter
from rewriter.errors import ParityError
from rewriter.rules import gather_to_gather_block_quantized as rule_module

NAME = "gather-to-gather-block-quantized"

STACKS = {  # initializer -> whether its reader contracts the second axis
    "hf_exporter/mixtral__batched_mm": dict.fromkeys(["val_234", "val_243", "val_434", "val_442"], False),
    "hf_blocks/mixtral__batched_mm__dynamo18": {"val_22": False, "val_34": False},
    "hf_blocks/gpt_oss__batched_mm__dynamo18": {"val_21": True, "val_70": True},
    "hf_blocks/qwen3_moe__eager__ts17": {"block.experts.gate_up_proj": False, "block.experts.down_proj": False},
}


def as_read(weight, transposed):
    return weight.swapaxes(-1, -2) if transposed else weight


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True)])
def test_every_expert_picked_at_run_time_keeps_its_bits(name, bits, symmetric):
    model = exported(name)
    spec = {"bits": bits, "block_size": 16, "symmetric": symmetric}
    result = rewriter.apply(model, rule_set(NAME, include=[{"role": "expert.*"}], **spec))
    got = result.model
    gathers = sum(n.input[0] in STACKS[name] for n in model.graph.node if n.op_type in ("Gather", "GatherND"))
    assert result.report.applied == {NAME: gathers} and histogram(got)["GatherBlockQuantized"] == gathers
    assert all(proof.runtime == "cpu" and not proof.skipped for proof in result.report.proofs)

    weights = result.report.weights
    assert len(weights) == 4 * len(STACKS[name]) and {w.expert for w in weights} == {0, 1, 2, 3}
    assert {(w.bits, w.symmetric, w.block_size) for w in weights} == {(bits, symmetric, 16)}
    assert not STACKS[name].keys() & {t.name for t in got.graph.initializer}

    stacks = {s: as_read(initializer(model, s), transposed) for s, transposed in STACKS[name].items()}
    float_model = with_weights(model, {s: as_read(quantized(w, **spec), STACKS[name][s]) for s, w in stacks.items()})
    feeds, _ = recorded(name)
    assert_close(run(got, feeds), run(float_model, feeds))


TABLE = "agraph (int64[b, s] ids) => (float[b, s, 64] y) { y = Gather(w, ids) }"


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_embedding(bits, symmetric, dtype):
    text = TABLE if dtype == np.float32 else TABLE.replace("float[", "float16[")
    model = graph_of(text, {"w": normal(50, 64, dtype=dtype)})
    spec = {"bits": bits, "block_size": 32, "symmetric": symmetric}
    result = rewriter.apply(model, rule_set(NAME, **spec))
    assert histogram(result.model) == {"GatherBlockQuantized": 1} and result.report.applied == {NAME: 1}
    feeds = {"ids": np.array([[0, 7, 49], [-1, -50, 3]])}
    wanted = run(with_weights(model, {"w": quantized(normal(50, 64, dtype=dtype), **spec)}), feeds)
    assert_close(run(result.model, feeds), wanted, 1e-3 if dtype == np.float16 else 1e-6)
    again = rewriter.apply(result.model, rule_set(NAME, **spec))
    assert not again.report.applied and nodes(again.model) == nodes(result.model)


STACK = "agraph (int64{ids} ids, float[t, {k}] x) => (float{out} y) {{ {body} }}"


@pytest.mark.parametrize(
    ("ids", "out", "shape", "transposed", "body"),
    [
        ("t", "[t, 32, 1]", (3, 32, 64), False, "g = Gather(w, ids) c = Unsqueeze(x, two) y = MatMul(g, c)"),
        ("t", "[t, 1, 32]", (3, 64, 32), True, "g = Gather<axis = -3>(w, ids) r = Unsqueeze(x, one) y = MatMul(r, g)"),
        ("", "[t, 32]", (3, 32, 64), False, "g = Gather(w, ids) r = Transpose(g) y = MatMul(x, r)"),
        ("", "[t, 32]", (3, 32, 64), False, "g = Gather(w, ids) y = Gemm<transB = 1>(x, g)"),
        ("", "[t, 32]", (3, 64, 32), True, "g = Gather(w, ids) y = Gemm(x, g)"),
        ("t, 1", "[t, 32, 1]", (3, 32, 64), False, "g = GatherND(w, ids) c = Unsqueeze(x, two) y = MatMul(g, c)"),
        ("t", "[t, 1, 32]", (3, 64, 32), True,
         "i = Unsqueeze(ids, one) g = GatherND(w, i) r = Unsqueeze(x, one) y = MatMul(r, g)"),
        ("1", "[t, 32]", (3, 32, 64), False,
         "g = Gather(w, ids) q = Squeeze(g, zero) r = Transpose(q) y = MatMul(x, r)"),
    ],
)  # fmt: skip
def test_stack_spellings(ids, out, shape, transposed, body):
    weights = {"w": normal(*shape), "zero": np.array([0]), "one": np.array([1]), "two": np.array([2])}
    model = graph_of(STACK.format(ids=f"[{ids}]" if ids else "", out=out, body=body, k=64), weights)
    spec = {"bits": 4, "block_size": 32, "symmetric": True}
    result = rewriter.apply(model, rule_set(NAME, **spec))
    assert result.report.applied == {NAME: 1}
    assert {(w.shape, w.role == "") for w in result.report.weights} <= {((32, 64), True), ((32, 64), False)}
    index = {"t": [2, 0, -1], "": 2, "t, 1": [[2], [0], [1]], "1": [1]}[ids]
    feeds = {"ids": np.array(index), "x": normal(3, 64, seed=1)}
    stored = as_read(quantized(as_read(weights["w"], transposed), **spec), transposed)
    assert_close(run(result.model, feeds), run(with_weights(model, {"w": stored}), feeds))


def test_shared_stack_two_readers_and_a_graph_output_in_between():
    text = """agraph (int64[t] a, int64[t] b, float[t, 64, 1] x) => (float[t, 32, 1] y, float[t, 32, 64] g)
    { g = Gather(w, a) h = Gather(w, b) p = MatMul(g, x) q = MatMul(h, x) y = Add(p, q) }"""
    model = graph_of(text, {"w": normal(3, 32, 64)})
    result = rewriter.apply(model, rule_set(NAME, bits=8))
    assert result.report.applied == {NAME: 2} and len(result.model.graph.initializer) == 2
    feeds = {"a": np.array([0, 1]), "b": np.array([2, 2]), "x": normal(2, 64, 1)}
    stored = quantized(normal(3, 32, 64), bits=8)
    assert_close(run(result.model, feeds), run(with_weights(model, {"w": stored}), feeds))


def test_inside_a_branch():
    text = """agraph (bool c, int64[t] ids) => (float[t, 64] y) {
        y = If (c) <
            then_branch = a () => (float[t, 64] g) { g = Gather(w, ids) },
            else_branch = b () => (float[t, 64] g2) { k = Gather(w, ids) g2 = Neg(k) }
        > }"""
    model = graph_of(text, {"w": normal(40, 64)})
    result = rewriter.apply(model, rule_set(NAME, bits=4))
    assert result.report.applied == {NAME: 2} and len(result.model.graph.initializer) == 2
    stored = quantized(normal(40, 64), bits=4)
    for taken in (True, False):
        feeds = {"c": np.array(taken), "ids": np.array([3, 39])}
        assert_close(run(result.model, feeds), run(with_weights(model, {"w": stored}), feeds))


def _bfloat16(model):
    for value in (*model.graph.initializer,):
        value.CopyFrom(onnx.helper.make_tensor("w", onnx.TensorProto.BFLOAT16, [40, 64], np.ones(2560)))
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.BFLOAT16
    return model


@pytest.mark.parametrize(
    ("reason", "text", "weight", "plan"),
    [
        ("rank 4", "(int64[t] i) => (float[t, 2, 8, 64] y) { y = Gather(w, i) }", normal(3, 2, 8, 64), {}),
        ("another axis", "(int64[t] i) => (float[40, t] y) { y = Gather<axis = 1>(w, i) }", normal(40, 64), {}),
        ("in batches", "(int64[3, 1] i) => (float[3, 64] y) { y = GatherND<batch_dims = 1>(w, i) }",
         normal(3, 32, 64), {}),
        ("one axis", "(int64[t, 2] i) => (float[t, 64] y) { y = GatherND(w, i) }", normal(3, 32, 64), {}),
        ("fewer than min_bytes", "(int64[t] i) => (float[t, 64] y) { y = Gather(w, i) }", normal(15, 64), {}),
        ("graph output", "(int64[t] i) => (float[t, 64] y, float[40, 64] w) { y = Gather(w, i) }", normal(40, 64), {}),
        ("Add also reads it", "(int64[t] i) => (float[t, 64] y, float[40, 64] z) { y = Gather(w, i) z = Add(w, w) }",
         normal(40, 64), {}),
        ("excluded by the plan", "(int64[t] i) => (float[t, 64] y) { y = Gather(w, i) }", normal(40, 64),
         {"exclude": [{"role": "embedding"}]}),
        ("different specs", "(int64[t] i) => (float[t, 32, 64] y) { y = Gather(w, i) }", normal(3, 32, 64),
         {"overrides": [{"weights": "w__slice_1", "bits": 8}]}),
        ("does not end on a byte", "(int64[t] i) => (float[t, 63] y) { y = Gather(w, i) }", normal(40, 63), {}),
    ],
)  # fmt: skip
def test_declines_and_leaves_the_graph(reason, text, weight, plan):
    model = graph_of(f"agraph {text}", {"w": weight})
    result = rewriter.apply(model, rule_set(NAME, **plan))
    assert not result.report.applied
    assert reason in " ".join(decline.reason for decline in result.report.declines)
    assert nodes(result.model) == nodes(model)


@pytest.mark.parametrize(
    ("text", "weight"),
    [
        ("(int64[t] i) => (int64[t, 64] y) { y = Gather(w, i) }", np.ones((40, 64), np.int64)),
        ("(int64[t] i) => (float[t] y) { y = Gather(w, i) }", normal(5000)),
        ("(int64[t] i, float[t, 64] x) => (float[t, 64] y) { g = Gather(w, i) y = Mul(x, g) }", normal(40, 64)),
    ],
)
def test_tables_that_are_no_weights_are_not_its_business(text, weight):
    model = graph_of(f"agraph {text}", {"w": weight})
    result = rewriter.apply(model, rule_set(NAME))
    assert not result.report.applied and not result.report.declines and nodes(result.model) == nodes(model)


def test_bfloat16_declines_where_there_is_no_kernel_and_fires_where_there_is():
    text = "agraph (int64[t] i) => (float[t, 64] y) { y = Gather(w, i) }"
    model = _bfloat16(graph_of(text, {"w": normal(40, 64)}))
    declined = rewriter.apply(model, rule_set(NAME, parity="none"), target="cpu")
    assert "bfloat16 has no kernel" in declined.report.declines[0].reason
    fired = rewriter.apply(model, rule_set(NAME, parity="none"), target="cuda@1.31")
    assert fired.report.applied == {NAME: 1}


@pytest.mark.parametrize(
    ("target", "spec", "reason"),
    [
        ("cpu@1.26", {"bits": 2}, "2 bits have no kernel (it runs 4, 8)"),
        ("cpu@1.26", {"symmetric": False, "block_size": 64}, "misreads the zero points of rows of 1 blocks"),
        ("cpu@1.26", {"symmetric": False, "block_size": 32}, ""),
        ("cpu@1.26", {"symmetric": False, "block_size": 64, "bits": 8}, ""),
        ("cpu@1.27", {"symmetric": False, "block_size": 64}, ""),
        ("cuda@1.26", {}, "misreads codes without zero points; quantize the table with symmetric: false"),
        ("cuda@1.26", {"symmetric": False}, ""),
        ("cuda@1.31", {"symmetric": False, "block_size": 64}, "misreads the zero points"),
        ("cuda@1.31", {"block_size": 128}, "misreads rows of K = 64 that end within a block of 128"),
        ("webgpu@1.31", {"symmetric": False, "block_size": 64}, "misreads the zero points"),
        ("webgpu@1.31", {}, ""),
    ],
)
def test_declines_what_the_target_would_misread(target, spec, reason):
    model = graph_of("agraph (int64[t] i) => (float[t, 64] y) { y = Gather(w, i) }", {"w": normal(40, 64)})
    report = rewriter.apply(model, rule_set(NAME, **{"block_size": 32, **spec}), target=target).report
    assert bool(report.applied) == (not reason)
    assert [reason in decline.reason for decline in report.declines] == ([True] if reason else [])


def test_the_index_of_a_view_is_left_to_unstack():
    text = "agraph (float[t, 64] x) => (float[t, 32] y) { g = Gather(w, i) y = Gemm<transB = 1>(x, g) }"
    result = rewriter.apply(graph_of(text, {"w": normal(3, 32, 64), "i": np.array(1)}), rule_set(NAME))
    assert not result.report.applied and not result.report.declines


@pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16])
def test_a_widened_table_is_proved_in_the_type_that_it_is_widened_to(half):
    """The proof stored the dequantized rows as halves, and took the right rewrite for a wrong one."""
    text = "agraph (int64[b, s] ids) => (float[b, s, 64] h) { wide = Cast<to=1>(w) h = Gather(wide, ids) }"
    result = rewriter.apply(graph_of(text, {"w": normal(256, 64).astype(half)}), rule_set(NAME), strict=True)
    (proof,) = result.report.proofs
    assert result.report.applied == {NAME: 1} and proof.max_relative <= 1e-5


def test_a_wrong_rule_is_caught(monkeypatch):
    def wrong(op, data, ids, others, **sizes):
        return right(op, data, op.Abs(op.Sub(ids, op.Constant(value_int=1))), others, **sizes)

    right = rule_module.gather
    monkeypatch.setattr(rule_module, "gather", wrong)
    with pytest.raises(ParityError, match=NAME):
        rewriter.apply(graph_of(TABLE, {"w": normal(50, 64)}), rule_set(NAME), strict=True)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_fires_with_parity_or_declines(data):
    rank = data.draw(st.sampled_from([2, 3]), label="rank")
    shape = data.draw(st.tuples(*[st.integers(1, 70)] * rank), label="shape")
    ids = data.draw(st.integers(0, 2), label="rank of ids")
    spec = {
        "bits": data.draw(st.sampled_from([2, 4, 8])),
        "block_size": data.draw(st.sampled_from([0, 16, 32, 128])),
        "symmetric": data.draw(st.booleans()),
    }
    op = data.draw(st.sampled_from(["Gather", "GatherND"] if ids else ["Gather"]))
    index = np.random.default_rng(0).integers(0, shape[0], {0: (), 1: (1,), 2: (3, 1)}[ids])
    dims = {0: "", 1: "[1]", 2: "[t, 1]"}[ids]
    out = ", ".join(["d", "e", "f", "g"][: ids + rank - 1 - (op == "GatherND")])
    weight = normal(*shape, seed=data.draw(st.integers(0, 9)))
    model = graph_of(f"agraph (int64{dims} ids) => (float[{out}] y) {{ y = {op}(w, ids) }}", {"w": weight})
    result = rewriter.apply(model, rule_set({NAME: {"min_bytes": 0}}, **spec))
    assert bool(result.report.applied) != bool(result.report.declines)
    if result.report.applied:
        stored = with_weights(model, {"w": quantized(weight, **spec)})
        assert_close(run(result.model, {"ids": index}), run(stored, {"ids": index}))
