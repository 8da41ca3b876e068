"""Perplexity, KL divergence and top-1 agreement on tokens, against NumPy on the models' own logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rewriter.errors import ParityError, UsageError
from rewriter.parity.quality import compare_quality
from rewriter.parity.runtime import OrtRuntime
from rewriter.parity.tokens import read_tokens, tokenize

V, H = 11, 6
TOKENS = np.random.default_rng(0).integers(0, V, (5, 40))


def bigram(noise=0.0, *, vocabulary=V, last=False, name="logits"):
    """logits[t] = table[token t] @ head, of every position or of the last."""
    rng = np.random.default_rng(3)
    table = rng.standard_normal((vocabulary, H)).astype(np.float32) * 2
    head = rng.standard_normal((H, vocabulary)).astype(np.float32)
    head += noise * np.random.default_rng(4).standard_normal(head.shape).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),
        helper.make_node("MatMul", ["x", "head"], [name]),
    ]
    weights = {"table": table, "head": head}
    if last:
        nodes[1].input[0] = "end"
        nodes.insert(1, helper.make_node("Gather", ["x", "minus"], ["end"], axis=1))
        weights["minus"] = np.array([-1])
    graph = helper.make_graph(
        nodes,
        "bigram",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["B", "S"])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", "N", vocabulary])],
        [numpy_helper.from_array(array, key) for key, array in weights.items()],
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])


def log_probabilities(model):
    logits = OrtRuntime().run(model, {"input_ids": TOKENS})["logits"].astype(np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_the_figures_are_those_of_the_logits():
    before, after = bigram(), bigram(0.3)
    found = compare_quality(before, after, TOKENS)
    e, a = log_probabilities(before), log_probabilities(after)
    following = TOKENS[:, 1:, None]
    losses = [-np.take_along_axis(p[:, :-1], following, -1).mean() for p in (e, a)]
    kl = (np.exp(e) * (e - a)).sum(axis=-1)
    np.testing.assert_allclose(found.perplexity_before.value, np.exp(losses[0]))
    np.testing.assert_allclose(found.perplexity_after.value, np.exp(losses[1]))
    np.testing.assert_allclose(found.perplexity_increase.value, np.exp(losses[1] - losses[0]) - 1)
    np.testing.assert_allclose(found.kl.value, kl.mean())
    np.testing.assert_allclose(found.kl_p99.value, np.quantile(kl, 0.99))
    assert found.top1.value == (e.argmax(-1) == a.argmax(-1)).mean() < 1
    assert (found.sequences, found.tokens) == (*TOKENS.shape[:1], TOKENS.size)
    for estimate in (found.perplexity_after, found.perplexity_increase, found.kl, found.top1):
        assert estimate.low < estimate.value < estimate.high
    assert found.kl_p99.low <= found.kl_p99.value <= found.kl_p99.high
    width = found.perplexity_after.high - found.perplexity_after.low
    assert found.perplexity_increase.high - found.perplexity_increase.low < width, "a pair is surer than its parts"


def test_a_model_is_as_good_as_itself(tmp_path):
    file = tmp_path / "model.onnx"
    onnx.save(bigram(), file)
    found = compare_quality(file, bigram(), TOKENS[:1])
    assert (found.kl.value, found.kl_p99.value, found.top1.value, found.perplexity_increase.value) == (0, 0, 1, 0)
    assert (found.kl.low, found.top1.high) == (None, None), "one sequence tells nothing of others"


def test_more_sequences_make_it_surer():
    rng = np.random.default_rng(9)
    few, many = (compare_quality(bigram(), bigram(0.3), rng.integers(0, V, (count, 40))) for count in (8, 512))
    assert many.kl.high - many.kl.low < (few.kl.high - few.kl.low) / 2


def test_progress_counts_both_models():
    told = []
    compare_quality(bigram(), bigram(), TOKENS, progress=lambda done, total: told.append((done, total)))
    assert told == [(n, 10) for n in range(1, 11)]


@pytest.mark.parametrize(
    ("before", "after", "tokens", "options", "message"),
    [
        (bigram(last=True), bigram(last=True), TOKENS, {}, "no logits for every position"),
        (bigram(name="y"), bigram(name="y"), TOKENS, {}, "no output is named logits"),
        (bigram(), bigram(), TOKENS, {"logits": "logit"}, "no output 'logit' .did you mean 'logits'"),
        (bigram(), bigram(), TOKENS[:, :1], {}, "a sequence of one token"),
        (bigram(), bigram(), TOKENS + V, {}, "none of the model's 11"),
    ],
)
def test_what_cannot_be_measured_is_refused(before, after, tokens, options, message):
    with pytest.raises(UsageError, match=message):
        compare_quality(before, after, tokens, **options)


def test_models_of_other_interfaces_are_refused():
    with pytest.raises(ParityError, match="outputs differ"):
        compare_quality(bigram(), bigram(name="y"), TOKENS)
    with pytest.raises((ParityError, UsageError)):
        compare_quality(bigram(vocabulary=V + 1), bigram(), TOKENS)


def test_an_output_may_be_named():
    assert compare_quality(bigram(name="y"), bigram(name="y"), TOKENS, logits="y").kl.value == 0


def test_tokens_come_from_a_file(tmp_path):
    np.save(tmp_path / "t.npy", TOKENS.astype(np.uint16))
    np.testing.assert_array_equal(read_tokens(tmp_path / "t.npy"), TOKENS)
    np.save(tmp_path / "one.npy", TOKENS[0])
    assert read_tokens(tmp_path / "one.npy").shape == (1, 40)
    for wrong in (np.zeros((2, 3)), np.zeros((1, 2, 3), int), np.zeros((0, 3), int)):
        np.save(tmp_path / "wrong.npy", wrong)
        with pytest.raises(UsageError, match="give token ids, integers"):
            read_tokens(tmp_path / "wrong.npy")
    (tmp_path / "text.npy").write_text("no")
    with pytest.raises(UsageError, match=r"not a \.npy file"):
        read_tokens(tmp_path / "text.npy")
    with pytest.raises(UsageError, match="there is no file"):
        read_tokens(tmp_path / "none.npy")


def word_tokenizer(folder: Path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "?": 3}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_tokens_come_from_a_text(tmp_path):
    file = word_tokenizer(tmp_path)
    (tmp_path / "text").write_text("a b c a b c d a")
    np.testing.assert_array_equal(tokenize(tmp_path / "text", file, 3), [[0, 1, 2], [0, 1, 2]])
    np.testing.assert_array_equal(tokenize(tmp_path / "text", tmp_path, 7), [[0, 1, 2, 0, 1, 2, 3]])
    with pytest.raises(UsageError, match="has 8 tokens, fewer than one sequence of 512"):
        tokenize(tmp_path / "text", file)
    with pytest.raises(UsageError, match=r"the tokenizer .* cannot be read"):
        tokenize(tmp_path / "text", tmp_path / "text", 3)
    with pytest.raises(UsageError, match=r"the text .* cannot be read"):
        tokenize(tmp_path / "none", file, 3)
