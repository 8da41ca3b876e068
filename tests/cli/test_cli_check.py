"""``rewriter check``: two models on the same inputs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from cli_models import GRANITE, linear, valid

from rewriter.report import Comparison


def test_check_measures_two_models(run, rewritten):
    code, out, err = run("check", GRANITE, rewritten)
    assert (code, err) == (0, "")
    assert re.search(r"logits +0\.\d+ +\S+ +0\.\d+ +\d+\.\d +\d+\.\d% +\S+ +\[0, \d+, \d+\]", out)
    assert run("check", GRANITE, GRANITE, "--max-relative-l2", "0", "--min-top1", "1", "-q") == (0, "", "")


def test_check_fails_past_a_limit(run, rewritten):
    code, _, err = run("check", GRANITE, rewritten, "--max-relative-l2", "1e-4", "-q")
    assert code == 1
    assert re.match(r"FAILED output 'logits': relative L2 0\.\d+ is above 0.0001\n", err)
    code, _, err = run("check", GRANITE, rewritten, "--min-snr-db", "90", "-q")
    assert code == 1
    assert re.search(r"SNR \d+\.\d dB is below 90 dB", err)
    plain = linear()
    code, _, err = run("check", plain, plain, "--min-top1", "0.9", "-q")
    assert (code, err) == (1, "FAILED top-1 agreement cannot be held: no output is named logits\n")
    assert run("check", plain, plain, "--min-top1", "0.9", "--logits", "y", "-q")[0] == 0


def test_check_on_inputs_of_ones_own(run):
    plain = linear()
    np.savez("feeds.npz", x=np.ones((2, 64), np.float32))
    code, out, _ = run("check", plain, plain, "--inputs", "feeds.npz", "--runtime", "reference")
    assert code == 0
    assert "run by reference on feeds.npz" in out
    np.savez("wrong.npz", z=np.ones(3))
    code, _, err = run("check", plain, plain, "--inputs", "wrong.npz")
    assert code == 2
    assert "missing: x; unknown: z" in err


def test_models_with_other_outputs_cannot_be_compared(run):
    code, out, err = run("check", GRANITE, linear())
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: the two models cannot be compared[^\n]+\n", err)


def test_outputs_that_hold_nothing_finite_do_not_pass_for_equal(run):
    broken = linear(weight=np.full((64, 32), np.nan, np.float32))
    code, out, _ = run("check", broken, broken)
    assert code == 0
    assert re.search(r"y +- +- +- +- +-", out)
    assert "no finite number in either model, so nothing was compared" in " ".join(out.split())
    code, _, err = run("check", broken, broken, "--max-relative-l2", "0.1", "-q")
    assert code == 1
    assert "output 'y' holds no finite number in either model" in err


def test_an_output_that_is_not_finite_fails(run):
    broken = linear(Path("nan.onnx"), weight=np.full((64, 32), np.inf, np.float32))
    code, _, err = run("check", linear(), broken, "-q")
    assert code == 1
    assert "output 'y' is not finite where the original is" in err
    code, _, err = run("check", broken, linear(), "-q")
    assert code == 1
    assert "output 'y' of the original itself holds NaN or infinity" in err


def test_check_as_json_is_a_comparison(run, rewritten):
    code, out, err = run("check", GRANITE, rewritten, "--json", "--min-snr-db", "90")
    found = valid(out, Comparison)
    assert code == 1
    assert (found["runtime"], found["seed"]) == ("cpu", 0)
    assert 0 < found["outputs"]["logits"]["top1"] <= 1
    assert any("is below 90 dB" in failure for failure in found["failures"])
    assert len(err.splitlines()) == len(found["failures"])
    assert valid(run("check", GRANITE, GRANITE, "--json")[1], Comparison)["outputs"]["logits"]["snr_db"] == "inf"


def test_check_writes_what_it_found_as_a_page(run, rewritten):
    np.save("tokens.npy", np.arange(12).reshape(2, 6))
    code, out, _ = run("check", GRANITE, rewritten, "--html", "check.html", "--min-snr-db", "90")
    page = Path("check.html").read_text()
    assert code == 1 and "Page    check.html" in out
    assert f"{rewritten}</span> against" in page and "present.0.key" in page and "random inputs, seed 0" in page
    assert re.search(r'<p class="bad">[^<]*logits[^<]* is below 90 dB', page)
    assert run("check", GRANITE, rewritten, "--tokens", "tokens.npy", "--html", "check.html", "-q")[0] == 0
    assert re.search(r"2 sequences, 12 tokens.*perplexity increase", Path("check.html").read_text(), re.DOTALL)
    code, _, err = run("check", GRANITE, rewritten, "--html", "check.txt")
    assert (code, err) == (2, "error: --html check.txt: a page is a file as check.html\n")
