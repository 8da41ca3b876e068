"""A budget keeps to its bytes, spends them where errors are largest, and its plan gives the same model again."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

import rewriter
from rewriter.budget import kept, sensitivity
from rewriter.budget.forms import Budget, Choice, Form, Group, worth_taking
from rewriter.budget.goal import MARGIN, Goal
from rewriter.budget.measured import measure
from rewriter.budget.plan import explain_choice, fit, with_choice
from rewriter.budget.samples import group_jobs, mean_errors, quantized_jobs
from rewriter.calibration import Calibration
from rewriter.calibration.capture import calibrate
from rewriter.cli import main
from rewriter.errors import UsageError
from rewriter.parity.model_inputs import token_feeds
from rewriter.parity.quality import compare_quality
from rewriter.quantize.types import WeightSpec
from rewriter.ruleset import load

MODELS = Path(__file__).parent / "models"
MODEL = MODELS / "mobius" / "granitemoehybrid_static_unroll_f32.onnx"


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


FORMS = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 90)), min_size=1, max_size=4)


@given(st.lists(FORMS, min_size=1, max_size=4), st.integers(0, 100))
def test_no_other_choice_that_fits_has_less_error(drawn, spare):
    groups = [Group(f"role{i}", 0, worth_taking(form(*f) for f in forms)) for i, forms in enumerate(drawn)]
    budget = Budget(tuple(groups), 1000, 7)
    total = budget.smallest + spare
    sums = [
        7 + sum(f.nbytes for f in forms) <= total and sum(f.error for f in forms)
        for forms in itertools.product(*(group.forms for group in groups))
    ]
    choice = budget.choose(total)
    assert choice.error == min(error for error in sums if error is not False)
    assert choice.nbytes <= total


@given(st.lists(FORMS, min_size=1, max_size=4), st.integers(0, 400))
def test_no_other_choice_that_loses_as_little_takes_fewer_bytes(drawn, error):
    groups = [Group(f"role{i}", 0, worth_taking(form(*f) for f in forms)) for i, forms in enumerate(drawn)]
    budget = Budget(tuple(groups), 1000, 7)
    sizes = [
        7 + sum(f.nbytes for f in forms)
        for forms in itertools.product(*(group.forms for group in groups))
        if sum(f.error for f in forms) <= error
    ]
    if sizes:
        choice = budget.reach(error)
        assert (choice.nbytes, choice.error <= error) == (min(sizes), True)
    else:
        with pytest.raises(UsageError, match="are expected to lose"):
            budget.reach(error)


def test_a_large_step_is_taken_before_small_ones_fill_the_room():
    lump = Group("expert*", 0, (form(100, 9.0), form(200, 1.0)))
    small = Group("lm_head", None, (form(10, 1.0), form(12, 0.5), form(20, 0.4)))
    choice = Budget((small, lump), 1000, 0).choose(213)
    assert choice.forms == {small: small.forms[1], lump: lump.forms[1]}


@pytest.fixture(scope="module")
def budget():
    return measure(MODEL, load("moe-int4"))


def test_more_bytes_never_make_more_error_and_none_is_overspent(budget):
    least = budget.choose(10**9).nbytes
    start = budget.smallest
    errors = []
    for total in np.linspace(start, least, 12).astype(int):
        choice = budget.choose(int(total))
        assert choice.nbytes <= total
        errors.append(choice.error)
    assert errors == sorted(errors, reverse=True) and errors[0] > 10 * errors[-1]


@pytest.mark.parametrize("share", [0.3, 0.6, 1.0])
def test_the_file_is_no_larger_than_asked(budget, share, tmp_path):
    start = budget.smallest
    total = int(start + share * (budget.choose(10**9).nbytes - start))
    _, choice = fit(MODEL, load("moe-int4"), budget, Goal(total))
    result = rewriter.apply(MODEL, with_choice(load("moe-int4"), choice))
    saved = result.save(tmp_path / "o")
    size = sum(file.stat().st_size for file in saved.parent.iterdir())
    assert size <= total
    assert (result.report.files_before, result.report.files_after) == (MODEL.stat().st_size, size)
    assert abs(size - choice.nbytes) < 0.1 * size
    assert len(result.report.weights) == sum(group.count for group in budget.groups)


@pytest.mark.parametrize("name", ["gpt_oss__default", "mixtral__batched_mm"])
def test_metadata_of_graphs_and_types_of_weights_count_too(name, tmp_path):
    model, rules = MODELS / "hf_exporter" / f"{name}.onnx", load("gptq-mixed")
    budget = measure(model, rules)
    total = budget.smallest + (budget.choose(10**9).nbytes - budget.smallest) // 4
    _, choice = fit(model, rules, budget, Goal(total))
    saved = rewriter.apply(model, with_choice(rules, choice), prover=lambda *_: None).save(tmp_path / "o")
    assert sum(file.stat().st_size for file in saved.parent.iterdir()) <= total


def test_the_plan_that_is_written_gives_the_same_model(tmp_path, capsys):
    plan = tmp_path / "plan.yaml"
    command = ["apply", str(MODEL), "--no-check", "--parity", "none"]
    assert main([*command, "-o", str(tmp_path / "a"), "--bits", "5", "--write-plan", str(plan)]) == 0
    said = capsys.readouterr().out
    assert "Budget  at most 5 bits a weight; the forms chosen take" in said
    table = said.partition("Other sizes")[2].partition("moe-int4 on")[0]
    errors = [float(found) for found in re.findall(r"[kM]B +\d\.\d\d +(\d+\.\d\d)", table)]
    assert errors == sorted(errors, reverse=True) and len(errors) > 4
    assert re.search(r" 1\.00 +chosen", table)
    assert main([*command, "-o", str(tmp_path / "b"), "-r", str(plan)]) == 0
    for file in (tmp_path / "a").iterdir():
        one, other = (_without_origin(folder / file.name) for folder in (tmp_path / "a", tmp_path / "b"))
        assert one == other, file.name


def test_a_plan_that_extends_a_file_moves_with_it(tmp_path):
    (tmp_path / "sets").mkdir()
    own, plan = tmp_path / "sets" / "own.yaml", tmp_path / "plans" / "plan.yaml"
    own.write_text("extends: moe-int4")
    plan.parent.mkdir()
    command = ["apply", str(MODEL), "--no-check", "--parity", "none", "-r", str(own), "--bits", "5"]
    assert main([*command, "-o", str(tmp_path / "a"), "--write-plan", str(plan)]) == 0
    moved = tmp_path / "moved"
    moved.mkdir()
    for folder in ("sets", "plans"):
        (tmp_path / folder).rename(moved / folder)
    assert load(moved / "plans" / "plan.yaml").plan.overrides


def _without_origin(file):
    """A file's bytes; of a model without its metadata, which name the rule set that made it."""
    if file.suffix != ".onnx":
        return file.read_bytes()
    model = onnx.load(file, load_external_data=False)
    del model.metadata_props[:]
    return model.SerializeToString(deterministic=True)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    tokens = np.random.default_rng(0).integers(0, 64, (4, 16))
    return calibrate(MODEL, tmp_path_factory.mktemp("budget") / "c", tokens=tokens)


@pytest.fixture(scope="module")
def measured(calibration):
    return measure(MODEL, load("gptq-mixed"), calibration=calibration)


def test_experts_may_have_one_scale_for_a_whole_row_and_other_weights_not(budget):
    for group in budget.groups:
        whole = [form for form in group.forms if form.spec.block_size == 0]
        assert bool(whole) == (group.role == "expert*"), group.role


def test_what_was_measured_is_kept_for_the_next_size(measured, calibration, monkeypatch, tmp_path):
    seen = shutil.copytree(calibration.folder, tmp_path / "c")
    (file,) = seen.glob("budget-*.json")
    with monkeypatch.context() as patched:
        patched.setattr("rewriter.budget.measured.mean_errors", None)  # nothing is measured again
        assert measure(MODEL, load("gptq-mixed"), calibration=str(seen)) == measured
    opened = Calibration.open(seen)
    assert kept.place(MODEL, load("gptq-mixed"), opened, {}) == file
    assert kept.place(MODEL, load("gptq-mixed"), opened, {"target": "cuda:sm80"}) != file
    assert kept.place(MODEL, load("gptq-int4"), opened, {}) != file
    assert kept.place(MODEL, load("gptq-mixed"), opened, {"imatrix": "x.npz"}) is None
    other = shutil.copy(MODEL.with_name("llama_tied_dense_f32.onnx"), tmp_path / "m.onnx")
    assert kept.place(other, load("gptq-mixed"), opened, {}) != file
    file.write_text("{")
    assert kept.read(file) is None
    calibrate(MODEL, seen, tokens=np.ones((1, 4), int), overwrite=True)
    assert not list(seen.glob("budget-*.json"))


def test_a_size_that_no_form_reaches_is_refused_before_anything_is_measured(calibration, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("rewriter.budget.measured.mean_errors", None)
    command = ["apply", str(MODEL), "-o", str(tmp_path / "o"), "--calibration", str(calibration.folder)]
    assert main([*command, "--size", "2kB"]) == 2
    assert "a budget of 2,000 bytes is too small" in capsys.readouterr().err


def test_a_divergence_is_reached_in_few_bytes(measured, calibration, tmp_path, capsys):
    command = ["apply", str(MODEL), "-r", "gptq-mixed", "--no-check", "--parity", "none", "--json"]
    command += ["--calibration", str(calibration.folder), "-o", str(tmp_path / "o"), "--html", str(tmp_path / "p.html")]
    command += ["--tokens", str(calibration.folder / "sample.npy")]
    sizes = []
    for kl in (0.02, 0.005):
        code = main([*command, "--max-kl", str(kl), "--overwrite"])
        said = capsys.readouterr()
        report = json.loads(said.out)
        sized, measured_kl = report["sized"], report["quality"]["kl"]["value"]
        assert code == 0 and measured_kl <= kl
        assert "choosing anew" not in said.err
        page = " ".join((tmp_path / "p.html").read_text().split())
        assert f"Asked for: {sized['asked']}." in page and f"Measured: KL {measured_kl:.4f} (" in page
        assert page.count("<td>chosen</td>") == 1 and "KL, 99th percentile" in page
        (chosen,) = (size for size in sized["sizes"] if size["chosen"])
        assert chosen["error"] <= MARGIN * kl < 2 * chosen["error"]
        assert sized["asked"] == f"a KL of at most {kl:g} (aimed at {MARGIN * kl:.3g})"
        assert sized["tokens"] == 64
        sizes.append(chosen["nbytes"])
    assert sizes == sorted(sizes)


def test_forms_are_chosen_anew_where_a_divergence_is_exceeded(measured, calibration, monkeypatch, tmp_path, capsys):
    command = ["apply", str(MODEL), "-r", "gptq-mixed", "--no-check", "--parity", "none", "--json", "--max-kl", "0.01"]
    command += ["--calibration", str(calibration.folder), "--tokens", str(calibration.folder / "sample.npy")]
    command += ["-o", str(tmp_path / "o")]
    monkeypatch.setattr("rewriter.budget.goal.Goal", functools.partial(Goal, share=4.0))  # aims far too high
    assert main([*command, "--write-plan", str(tmp_path / "plan.yaml")]) == 0
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert "is above 0.01 on these tokens: choosing anew for a KL of at most 0.01 (aimed at 0.0" in said.err
    found = report["quality"]
    assert found["kl"]["value"] <= 0.01 and not found["failures"]
    (chosen,) = (size for size in report["sized"]["sizes"] if size["chosen"])
    assert chosen["error"] < 0.04
    again = compare_quality(MODEL, tmp_path / "o" / MODEL.name, calibration.sample()).kl.value
    assert again == pytest.approx(found["kl"]["value"])

    def reach(budget, kl):
        if kl < 0.03:
            raise UsageError("the largest forms lose more")
        return plain_reach(budget, kl)

    plain_reach, plain_quality = Budget.reach, compare_quality
    with monkeypatch.context() as patched:
        patched.setattr(Budget, "reach", reach)
        assert main([*command, "--overwrite"]) == 1
    said = capsys.readouterr().err
    assert "what was chosen before stays: the largest forms lose more" in said
    assert "is above 0.01; the output is kept" in said

    def no_number(*given, **options):
        found = plain_quality(*given, **options)
        return dataclasses.replace(found, kl=dataclasses.replace(found.kl, value=math.nan))

    monkeypatch.setattr("rewriter.parity.quality.compare_quality", no_number)
    assert main([argument for argument in [*command, "--overwrite"] if argument != "--json"]) == 1
    said = capsys.readouterr().err
    assert "choosing anew" not in said and "is above 0.01; the output is kept" in said


def test_a_calibration_decides_by_output_errors(budget, measured):
    assert (measured.tokens, budget.tokens) == (64, 0)
    errors = [sum(g.forms[0].error for g in found.groups if g.role == "expert*") for found in (measured, budget)]
    assert errors[0] != errors[1]


def test_a_sensitivity_is_the_divergence_that_the_role_alone_makes(calibration):
    measured = [
        sensitivity.measured(MODEL, load("gptq-mixed"), ["lm_head", "expert*"], calibration, target=target)
        for target in ("auto", "cuda:sm80")  # a model that is laid out for another machine is none to run here
    ]
    assert measured[0] == measured[1]
    found, tokens = measured[0]
    assert tokens == 64
    for role, weight in found.items():
        only = {"quantization.include": [{"role": role}]}
        alone = rewriter.apply(MODEL, "rtn", overrides=only)
        expected = compare_quality(MODEL, alone.ir_model, calibration.sample()).kl.value
        groups = group_jobs(quantized_jobs(rewriter.apply(MODEL, "rtn", overrides=only, calibration=calibration)))
        errors = [mean_errors(jobs, [sensitivity.PROBE])[0] for jobs in groups.values()]
        assert expected == pytest.approx(weight * sum(errors), rel=1e-3)
        assert expected > 0


def test_what_does_not_reach_the_output_is_not_sensitive(calibration):
    model = ir.load(MODEL)
    for name, value in model.graph.initializers.items():
        if name.endswith("block_sparse_moe.output_linear.weight"):
            value.const_value = ir.tensor(np.zeros_like(value.const_value.numpy()), name=name)
    found, _ = sensitivity.measured(model, load("gptq-mixed"), ["lm_head", "expert*"], calibration)
    assert found["lm_head"] > 0
    assert found["expert*"] == 0


def test_tokens_that_are_padded_are_no_sample(tmp_path):
    feed = token_feeds(ir.load(MODEL), np.arange(12)[None])
    feed["attention_mask"][:, :5] = 0
    assert calibrate(MODEL, tmp_path / "c", feeds=[feed]).sample() is None


def test_fewer_bits_than_there_are_is_one_line_with_what_can_be_had(tmp_path, capsys):
    command = [
        "apply",
        str(MODEL),
        "-o",
        str(tmp_path / "o"),
        "--no-check",
        "--parity",
        "none",
        "--rules",
        "gptq-mixed",
    ]
    assert main([*command, "--bits", "4.5"]) == 0
    assert main([*command, "--bits", "1.5", "--overwrite"]) == 2
    said = capsys.readouterr().err
    found = re.search(r"smallest forms take [\d,]+ \((.+) bits\), the largest [\d,]+ \((.+) bits\)", said)
    assert 2 < float(found[1]) < 4.5
    assert float(found[2]) > 8


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--size", "1000"], "too small"),
        (["--size", "8.2"], "'8.2' is 8.2 bytes; did you mean 8.2MB?"),
        (["--size", "1MB", "--bits", "4"], "give one of --size, --bits and --max-kl"),
        (["--write-plan", "x.yaml"], "give one of --size, --bits and --max-kl"),
        (["--max-kl", "0.1"], "--max-kl takes a calibration on tokens"),
        (["--size", "1MB", "--write-plan", "nowhere/p.yaml"], "cannot write the plan 'nowhere/p.yaml': there is no"),
        (["--size", "1MB", "--write-plan", "folder.yaml"], "the plan 'folder.yaml' is a directory"),
        (["--size", "1MB", "--write-plan", "model.onnx"], "a rule set is a file as plan.yaml"),
    ],
)
def test_what_cannot_be_is_one_clear_line(more, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.yaml").mkdir()
    assert main(["apply", str(MODEL), "-o", str(tmp_path / "o"), *more]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_size_at_which_a_smaller_one_is_better_is_not_listed():
    def choice(nbytes, error):
        return Choice({object(): nbytes}, nbytes, error)

    chosen_one = choice(50, 0.13)
    others = [choice(40, 0.3), choice(45, 0.4), choice(55, 0.18), choice(60, 0.12), choice(70, 0.12)]
    budget = SimpleNamespace(tokens=1, beside=lambda _: others, bits_of=float)
    found = explain_choice(budget, chosen_one, Goal(50))
    assert [(size.nbytes, size.chosen) for size in found.sizes] == [(40, False), (50, True), (60, False)]
