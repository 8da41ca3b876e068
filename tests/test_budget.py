"""A budget keeps to its bytes, spends them where errors are largest, and its plan gives the same model again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import rewriter
from rewriter.budget.measured import Budget, Form, Group, measure
from rewriter.budget.plan import chosen, fit
from rewriter.calibration.capture import calibrate
from rewriter.cli import main
from rewriter.errors import UsageError
from rewriter.quantize.types import WeightSpec
from rewriter.ruleset import load

MODEL = Path(__file__).parent / "models" / "mobius" / "granitemoehybrid_static_unroll_f32.onnx"


def form(nbytes, error, bits=4):
    return Form(WeightSpec(bits=bits), nbytes, error)


def test_bytes_go_where_they_save_most():
    cheap = Group("attention.v", 0, (form(10, 8.0), form(20, 1.0)))
    dear = Group("expert*", 0, (form(100, 9.0), form(200, 1.0)))
    budget = Budget((dear, cheap), 1000, 50)
    assert budget.choose(160).forms == {dear: dear.forms[0], cheap: cheap.forms[0]}
    assert budget.choose(170).forms == {dear: dear.forms[0], cheap: cheap.forms[1]}
    whole = budget.choose(270)
    assert (whole.nbytes, whole.error) == (270, 2.0)
    with pytest.raises(UsageError, match="too small: the smallest forms take 160"):
        budget.choose(159)


@pytest.fixture(scope="module")
def budget():
    return measure(MODEL, load("moe-int4"))


def test_more_bytes_never_make_more_error_and_none_is_overspent(budget):
    least = budget.choose(10**9).nbytes
    start = budget.rest + sum(group.forms[0].nbytes for group in budget.groups)
    errors = []
    for total in np.linspace(start, least, 12).astype(int):
        choice = budget.choose(int(total))
        assert choice.nbytes <= total
        errors.append(choice.error)
    assert errors == sorted(errors, reverse=True) and errors[0] > 10 * errors[-1]


@pytest.mark.parametrize("share", [0.3, 0.6, 1.0])
def test_the_file_is_no_larger_than_asked(budget, share, tmp_path):
    start = budget.rest + sum(group.forms[0].nbytes for group in budget.groups)
    total = int(start + share * (budget.choose(10**9).nbytes - start))
    choice = fit(MODEL, load("moe-int4"), budget, total)
    result = rewriter.apply(MODEL, chosen(load("moe-int4"), choice))
    saved = result.save(tmp_path / "o")
    size = sum(file.stat().st_size for file in saved.parent.iterdir())
    assert size <= total
    assert abs(size - choice.nbytes) < 0.1 * size
    assert len(result.report.weights) == sum(group.count for group in budget.groups)


def test_the_plan_that_is_written_gives_the_same_model(tmp_path, capsys):
    plan = tmp_path / "plan.yaml"
    command = ["apply", str(MODEL), "--no-check", "--parity", "none"]
    assert main([*command, "-o", str(tmp_path / "a"), "--bits", "5", "--write-plan", str(plan)]) == 0
    said = capsys.readouterr().out
    assert "Budget" in said and "one bit more" in said and "one bit less" in said
    assert main([*command, "-o", str(tmp_path / "b"), "-r", str(plan)]) == 0
    names = sorted(file.name for file in (tmp_path / "a").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_calibration_decides_by_output_errors(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 64, (2, 16))
    calibration = calibrate(MODEL, tmp_path / "c", tokens=tokens)
    with_it = measure(MODEL, load("gptq-int4"), calibration=calibration)
    without = measure(MODEL, load("gptq-int4"))
    errors = [sum(g.forms[0].error for g in found.groups if g.role == "expert*") for found in (with_it, without)]
    assert errors[0] != errors[1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--size", "1000"], "too small"),
        (["--size", "1MB", "--bits", "4"], "give one of --size and --bits"),
        (["--write-plan", "x.yaml"], "give one of --size and --bits"),
    ],
)
def test_what_cannot_be_is_one_clear_line(more, message, tmp_path, capsys):
    assert main(["apply", str(MODEL), "-o", str(tmp_path / "o"), *more]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
