"""``rewriter.compare`` and ``rewriter compare``: which rule set to take."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

import rewriter
from rewriter.cli import main
from rewriter.errors import UsageError

QWEN = Path(__file__).parent / "models" / "mobius" / "qwen3_moe_dense_experts_f32.onnx"
TOKENS = np.random.default_rng(0).integers(0, 512, (2, 6))


@pytest.fixture(scope="module")
def found():
    return rewriter.compare(QWEN, ["rtn", "experts-int4", "unstack"], target="cpu@1.32")


def test_each_rule_set_is_measured(found):
    rtn, experts, unstack = found.rows
    assert (found.tokens, unstack.nbytes, unstack.weights, unstack.mean_error) == (0, found.nbytes, 0, None)
    assert unstack.output.relative_l2 == 0 and unstack.float_experts == 196_608
    assert rtn.nbytes < experts.nbytes < unstack.nbytes and (rtn.weights, rtn.float_experts) == (22, 0)
    assert 0.05 < rtn.mean_error <= rtn.worst_error < 0.2 and rtn.output.relative_l2 > 0.01
    report = rewriter.apply(QWEN, "rtn", target="cpu@1.32").report
    assert rtn.nbytes == report.bytes_after


def test_with_tokens_predictions_are_compared():
    (rtn, eight) = rewriter.compare(QWEN, ["rtn", "moe-int8"], tokens=TOKENS).rows
    assert 0 < eight.quality.kl.value < rtn.quality.kl.value and rtn.output is None
    assert rtn.quality.sequences == 2


def test_a_rule_set_that_cannot_run_is_a_row_with_the_reason():
    rules = {"quantization": {"exclude": [{"weights": "nothing.*"}]}, "extends": "rtn"}
    bad, good = rewriter.compare(QWEN, [rules, "unstack"]).rows
    assert bad.nbytes is None and "matches nothing in the model" in bad.problem and good.nbytes


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (TOKENS.astype(np.float32), r"tokens are integers \[sequences, length\], not float32\[2, 6\]"),
        (TOKENS + 512, r"is none of the model's 512"),
        (TOKENS[:, :1], "a sequence of one token has no next one"),
    ],
)
def test_wrong_tokens_are_refused_before_a_rule_set_is_run(tokens, message, monkeypatch):
    monkeypatch.setattr("rewriter.api.apply", None)
    with pytest.raises(UsageError, match=message):
        rewriter.compare(QWEN, ["rtn"], tokens=tokens)


def test_rule_sets_are_a_list():
    for wrong in ("rtn", []):
        with pytest.raises(UsageError, match="as a list"):
            rewriter.compare(QWEN, wrong)


def test_the_command_prints_one_table_and_writes_one_page(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")  # a narrow terminal leaves columns out, and says which
    np.save("tokens.npy", TOKENS)
    assert main(["compare", str(QWEN), "--rules", "rtn", "unstack", "--tokens", "tokens.npy", "--html", "p.html"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^rtn +[\d.]+ kB +17\.\d% +8\.\d+%.* +2\.0\d kB", out, re.MULTILINE)
    assert re.search(r"^unstack .* \+0\.00% +0\.0000 .* 100\.0% .*197 kB of experts", out, re.MULTILINE)
    page = Path("p.html").read_text()
    assert "197 kB of experts" in page and re.search(r"\d+ positions of real tokens", page)
    assert main(["compare", str(QWEN), "unstack", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["rule_set"] == "unstack"
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["compare", str(QWEN), "unstack", "--tokens", "tokens.npy"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80 and "perplexity" in out and re.search(r" KL ", out)
    assert "left out at 80 columns: of now, worst error" in out
    assert main(["compare", str(QWEN), "unstak"]) == 2
    assert "did you mean 'unstack'" in capsys.readouterr().err
