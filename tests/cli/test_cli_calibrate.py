"""``rewriter calibrate``, and ``rewriter check`` on tokens."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from cli_models import GRANITE, MODELS, valid

from rewriter import Calibration
from rewriter.report.quality import Quality

QWEN = MODELS / "hf_exporter" / "qwen3_moe__default.onnx"


@pytest.fixture
def tokens():
    np.save("tokens.npy", np.random.default_rng(0).integers(0, 100, (6, 16)))
    return Path("tokens.npy")


def test_calibrate_says_what_experts_saw(run, tokens):
    code, out, err = run("calibrate", QWEN, "--tokens", tokens, "--sequences", "4", "-o", "c")
    assert (code, err) == (0, "")
    assert "on 64 tokens: " in out
    assert re.search(r"^0 +4 +\d+ +\d+ +\d+ +0 +\d+ +\d+ \(\d+\)", out, re.MULTILINE)
    assert Calibration.open("c").tokens == 64
    assert run("calibrate", QWEN, "--tokens", tokens, "-o", "c", "--overwrite", "-q") == (0, "", "")
    assert Calibration.open("c").tokens == 96


def test_calibrate_writes_a_page(run, tokens):
    assert run("calibrate", QWEN, "--tokens", tokens, "-o", "c", "--html", "c.html", "-q") == (0, "", "")
    text = Path("c.html").read_text()
    assert text.count("<rect ") == 2 * 4
    code, _, err = run("calibrate", QWEN, "--tokens", tokens, "-o", "d", "--html", "c.txt")
    assert (code, "a page is a file as calibration.html" in err) == (2, True)


def test_calibrate_takes_text(run):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 5, "b": 6}, unk_token="a"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save("tokenizer.json")
    Path("book.txt").write_text("a b b a " * 10)
    code, out, _ = run(
        "calibrate", QWEN, "--text", "book.txt", "--tokenizer", "tokenizer.json", "--length", "8", "-o", "c"
    )
    assert code == 0
    assert "on 40 tokens" in out


def test_calibrate_takes_inputs(run):
    Path("feeds").mkdir()
    ids = np.random.default_rng(0).integers(0, 100, (1, 9))
    np.savez("feeds/a.npz", input_ids=ids, attention_mask=np.ones_like(ids))
    np.savez("feeds/b.npz", input_ids=ids[:, :4], attention_mask=np.ones((1, 4), np.int64))
    assert run("calibrate", QWEN, "--feeds", "feeds", "-o", "c", "-q") == (0, "", "")
    assert Calibration.open("c").tokens == 13


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give the inputs to calibrate on: --tokens, --text with --tokenizer, or --feeds"),
        (("--feeds", "none"), "there is no such directory"),
        (("--feeds", "."), "there are no inputs to run the model on"),
        (("--tokens", "none.npy"), "there is no file 'none.npy'"),
        (("--text", "a"), "--text and --tokenizer belong together"),
        (("--text", "a", "--tokens", "b", "--tokenizer", "c"), "choose one"),
        (("--sequences", "3"), "--sequences is about --tokens or --text"),
        (("--tokens", "tokens.npy", "--provider", "cuba"), "unknown runtime 'cuba' (did you mean"),
    ],
)
def test_what_calibrate_cannot_do_is_one_line(run, tokens, arguments, message):
    code, out, err = run("calibrate", QWEN, "-o", "c", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not Path("c").exists()


def test_tokens_that_are_none_of_the_models_are_refused_before_anything_is_written(run):
    np.save("far.npy", np.full((2, 8), 10**6))
    np.save("flat.npy", np.zeros(10_000, np.int64))
    for file, message in (
        ("far.npy", "token 1000000 is none of the model's"),
        ("flat.npy", "one sequence of 10,000; give"),
    ):
        code, out, err = run("apply", GRANITE, "-o", "o", "--tokens", file)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert message in err and not Path("o").exists()


def test_a_calibration_takes_the_place_of_another_and_of_nothing_else(run, tokens):
    Path("c").mkdir()
    Path("c/precious").write_text("")
    code, _, err = run("calibrate", QWEN, "--tokens", tokens, "-o", "c")
    assert code == 2
    assert "exists and holds files" in err
    assert run("calibrate", GRANITE, "--tokens", tokens, "-o", "c", "--overwrite", "-q")[0] == 0
    assert run("calibrate", QWEN, "--tokens", tokens, "-o", "c", "--overwrite", "-q")[0] == 0
    found = Calibration.open("c")
    assert {file.name for file in Path("c").iterdir()} == {*found.files, "calibration.json", "precious"}


def test_check_measures_quality_on_tokens(run, tokens, rewritten):
    code, out, err = run("check", GRANITE, rewritten, "--tokens", tokens)
    assert (code, err) == (0, "")
    assert "6 sequences, 96 tokens" in out
    assert re.search(r"perplexity increase +[+-]\d+\.\d+% +[+-]\d+\.\d+% to [+-]\d+\.\d+%", out)
    assert re.search(r"same most likely token +\d+\.\d+%", out)


def test_check_holds_limits_on_tokens(run, tokens, rewritten):
    code, _, err = run("check", GRANITE, rewritten, "--tokens", tokens, "--max-kl", "1e-9", "--min-top1", "1", "-q")
    assert code == 1
    assert re.fullmatch(r"FAILED KL divergence \S+ is above 1e-09\nFAILED top-1 agreement \S+ is below 100.00%\n", err)
    assert run("check", GRANITE, GRANITE, "--tokens", tokens, "--max-kl", "0", "--min-top1", "1", "-q")[0] == 0


def test_quality_as_json(run, tokens, rewritten):
    code, out, _ = run("check", GRANITE, rewritten, "--tokens", tokens, "--json", "--max-kl", "0")
    assert code == 1
    found = valid(out, Quality)
    assert found["kl"]["low"] <= found["kl"]["value"] <= found["kl"]["high"]
    assert found["failures"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tokens", "tokens.npy", "--min-snr-db", "3"), "--min-snr-db is not about tokens"),
        (("--tokens", "tokens.npy", "--inputs", "x.npz"), "--inputs is not about tokens"),
        (("--max-kl", "3"), "--max-kl is about --tokens or --text"),
        (("--memory", "1GB"), "--memory is about --tokens or --text"),
    ],
)
def test_what_check_cannot_do_with_tokens_is_one_line(run, tokens, arguments, message):
    code, out, err = run("check", GRANITE, GRANITE, *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_gptq_without_a_calibration_is_said_first(run):
    code, _, err = run("apply", QWEN, "-o", "o", "-r", "gptq-int4", "-q", "--no-check", "--parity", "none")
    assert code == 0
    assert err.startswith(
        "warning: rule set 'gptq-int4' rounds by what weights saw (gptq), and no --calibration is given"
    )
    assert run("apply", QWEN, "-o", "p", "-r", "rtn", "-q", "--no-check", "--parity", "none") == (0, "", "")
