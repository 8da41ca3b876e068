"""``rewriter apply``: what it writes, what it prints, and what makes it fail."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnx
import pytest
from cli_models import GRANITE, NEEDS_FC3, linear, tree

import rewriter
from rewriter import api
from rewriter.cli import comparison
from rewriter.errors import TargetError
from rewriter.parity import runtime
from rewriter.rules import matmul_to_matmul_nbits


def test_apply_writes_a_model_and_says_what_it_did(run, tmp_path):
    before = GRANITE.read_bytes()
    code, out, err = run("apply", GRANITE, "-o", "out", "--rules", "experts-int4", "--report", "out/report.json")
    assert (code, err) == (0, "")
    assert sorted(tree(tmp_path)) == ["out/granitemoehybrid_static_unroll_f32.onnx", "out/report.json"]
    assert GRANITE.read_bytes() == before
    onnx.checker.check_model(onnx.load(tmp_path / "out" / GRANITE.name))
    for words in (
        r"experts-int4 on .*granite.*, for cpu@",
        r"unstack +16 +0 +2 classes run",
        r"matmul-to-matmul-nbits +\d+ +\S+ +\d+ class(es)? run",
        r"\d+ +matmul-to-matmul-nbits: not included by the plan .*\n +model/layers\S+; \S+ kB stay float",
        r"expert.gate_up +8 +4 +5.000 +131 kB +20.5 kB +\d\.\d\d% +\d\.\d\d%",
        r"Against the original \((cpu|reference), random inputs, seed 0\)",
        r"logits +0?\.\d+",
        r"Size +813 kB -> \d{3} kB \(\d\.\dx smaller\) on disk",
        r"Output +out/granitemoehybrid_static_unroll_f32.onnx",
        r"Report +out/report.json",
    ):
        assert re.search(words, out), words
    assert "\x1b" not in out


def test_the_report_is_the_whole_truth(run, tmp_path):
    code, *_ = run("apply", GRANITE, "-o", "out", "-r", "experts-int4", "--report", "r.json", "-q", "--parity", "all")
    report = json.loads((tmp_path / "r.json").read_text())
    assert code == 0
    assert report["applied"]["unstack"] == 16
    assert len(report["applications"]) == sum(report["applied"].values())
    assert {w["bits"] for w in report["weights"]} == {4}
    assert all(w["bytes_after"] * 8 == 5 * w["shape"][0] * w["shape"][1] for w in report["weights"])
    assert report["parity"]["outputs"]["logits"]["top1"] <= 1
    assert report["parity"]["failures"] == []
    assert all(p["max_relative"] <= p["tolerance"] for p in report["proofs"])


def test_what_was_quantized_anew_was_not_left_as_it_was(run):
    model = GRANITE.parents[1] / "genai" / "gpt_oss_int4_cpu_b32.onnx"
    Path("back.yaml").write_text("phases: [{name: a, rules: [qmoe-to-moe]}, {name: b, rules: [moe-to-qmoe]}]\n")
    out = run("apply", model, "-o", "out", "-r", "back.yaml", "--no-check", "--parity", "none")[1]
    assert re.search(r"qmoe-to-moe +2[\s\S]*moe-to-qmoe +2", out)
    assert re.search(r"Quantized already, left as they were: 7 MatMulNBits\n", out)


def test_unstacking_changes_no_output_and_the_report_says_so_in_json(run, tmp_path):
    code, out, _ = run("apply", GRANITE, "-o", "out", "-r", "unstack", "--report", "r.json")
    report = json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)
    assert code == 0
    assert report["parity"]["outputs"]["logits"]["snr_db"] == "inf"
    assert re.search(r"logits +0 +0 +1.000000 +inf +100.0%", out)


def test_quiet_prints_nothing(run):
    assert run("apply", GRANITE, "-o", "out", "-q", "--no-check") == (0, "", "")


def test_options_reach_the_rule_set(run, tmp_path):
    code, *_ = run(
        *("apply", GRANITE, "-o", "out/named.onnx", "-r", "experts-int4", "--report", "out/r.json", "-q", "--no-check"),
        *("--set", "quantization.default.bits=8", "--set", "quantization.default.symmetric=false"),
        *("--parity", "none", "--target", "cpu@1.28", "--memory", "1MiB", "--max-shard-size", "100kB"),
    )
    report = json.loads((tmp_path / "out" / "r.json").read_text())
    assert code == 0
    assert {(w["bits"], w["symmetric"]) for w in report["weights"]} == {(8, False)}
    assert (report["target"], report["proofs"], report["parity"]["skipped"]) == ("cpu@1.28", [], "--no-check")
    assert sum("named.onnx-0" in name for name in tree(tmp_path / "out")) > 1


def test_a_rule_set_of_ones_own(run, tmp_path):
    Path("mine.yaml").write_text("extends: unstack\ndescription: mine\n")
    code, out, _ = run("apply", GRANITE, "-o", "out", "-r", "mine.yaml", "--no-check", "--require", "unstack")
    assert code == 0
    assert out.startswith("mine on ")


def test_nothing_fired_is_said(run):
    code, out, _ = run("apply", NEEDS_FC3, "-o", "out", "-r", "unstack", "--no-check")
    assert code == 0
    assert "Nothing fired: the output is the model as it was." in out


def test_names_are_shown_as_they_are(run):
    model = linear(weight_name="[red]w[/red]", node="a[b]c")
    code, out, _ = run("apply", model, "-o", "out")
    assert code == 0
    assert "[red]w[/red]" in out
    assert "a[b]c" in run("explain", model)[1]


def test_an_existing_output_is_replaced_on_demand(run, tmp_path):
    model = linear()
    assert run("apply", model, "-o", "out", "-q")[0] == 0
    first = tree(tmp_path)
    code, _, err = run("apply", model, "-o", "out", "-q", "-r", "unstack")
    assert code == 2
    assert "--overwrite" in err
    assert tree(tmp_path) == first
    assert run("apply", model, "-o", "out", "-q", "-r", "unstack", "--overwrite")[0] == 0
    assert tree(tmp_path) != first


# exit code 1


def failures(err):
    lines = err.splitlines()
    assert all(line.startswith("FAILED ") and line.endswith("; the output is kept") for line in lines)
    return lines


def test_a_limit_that_does_not_hold_fails_and_keeps_the_output(run, tmp_path):
    limits = ("--set", "parity.max_relative_l2=1e-3", "--set", "parity.min_snr_db=60", "--set", "parity.min_top1=1.0")
    code, out, err = run("apply", GRANITE, "-o", "out", "--report", "r.json", *limits)
    assert code == 1
    text = "\n".join(failures(err))
    assert "relative L2" in text
    assert "SNR" in text
    assert "top-1 agreement" in text
    assert "Output" in out
    assert (tmp_path / "out" / GRANITE.name).exists()
    assert len(json.loads((tmp_path / "r.json").read_text())["parity"]["failures"]) == len(failures(err))


def test_limits_that_hold_are_no_failure(run):
    assert run("apply", GRANITE, "-o", "out", "-q", "--set", "parity.max_relative_l2=0.9") == (0, "", "")


def test_a_required_rule_that_never_fires_fails(run, tmp_path):
    model = linear()
    required = ("--require", "matmul-to-matmul-nbits", "--require", "unstack")
    code, _, err = run("apply", model, "-o", "out", "-q", *required)
    assert code == 1
    assert failures(err) == [
        "FAILED required rule unstack never fired: nothing in the model matched it; the output is kept"
    ]
    assert (tmp_path / "out" / model.name).exists()
    excluded = ("--set", "quantization.include=[{role: lm_head}]")
    _, _, err = run("apply", model, "-o", "out2", "-q", "-r", "experts-int4", *excluded, *required[:2])
    assert "never fired: it declined: not included by the plan" in err


def test_whole_models_are_compared_where_that_is_cheap_and_possible(run, monkeypatch):
    code, out, _ = run("apply", NEEDS_FC3, "-o", "1")
    assert code == 0
    assert "Not compared with the original: the original does not run: ONNX Runtime (cpu)" in out
    code, _, err = run("apply", NEEDS_FC3, "-o", "2", "-q", "--check")
    assert code == 1
    assert "the comparison that was asked for cannot be made: the original does not run" in failures(err)[0]
    monkeypatch.setattr(comparison, "LARGEST", 100)
    model = linear()
    assert "has 8.19 kB of weights (--check compares all the same)" in run("apply", model, "-o", "3")[1]
    assert "Against the original" in run("apply", model, "-o", "4", "--check")[1]
    monkeypatch.setattr(comparison, "LARGEST", 1 << 30)
    monkeypatch.setattr(comparison, "MOST_NODES", 0)
    assert "the model has 1 nodes (--check" in run("apply", model, "-o", "6")[1]
    nodes = len(onnx.load(GRANITE).graph.node)
    monkeypatch.setattr(comparison, "MOST_NODES", nodes - 10)
    assert "nodes (--check" in run("apply", GRANITE, "-o", "7", "-r", "fuse-experts")[1]
    assert len(onnx.load("7/" + GRANITE.name).graph.node) < nodes - 20, "it is the given model that is large"
    assert "Against the original" in run("apply", model, "-o", "5", "--set", "parity.min_snr_db=1")[1]


def test_a_model_that_draws_numbers_is_not_compared(run):
    for number, op in enumerate(("RandomUniformLike <low = 0.99, high = 1.01> (x)", "Dropout (x, half, yes)")):
        model = onnx.load(linear())
        values = "float half = {0.5}, bool yes = {1}"
        drawn = onnx.parser.parse_graph(f"g (float[n, 64] x) => (float[n, 64] d) <{values}> {{ d = {op} }}")
        model.graph.initializer.extend(drawn.initializer)
        model.graph.node[0].input[0] = "d"
        model.graph.node.insert(0, drawn.node[0])
        onnx.save(model, f"random{number}.onnx")
        code, out, _ = run("apply", f"random{number}.onnx", "-o", str(number))
        assert code == 0 and "draws other numbers each time that it runs" in out
        code, _, err = run("apply", f"random{number}.onnx", "-o", f"{number}-check", "-q", "--check")
        assert code == 1 and "cannot be made: node 'd'" in failures(err)[0]


def test_a_rewritten_model_that_does_not_run_fails(run, monkeypatch):
    def broken(self, *args, **kwargs):
        raise TargetError("ONNX Runtime (cpu) cannot load the model: no")

    monkeypatch.setattr(api.Result, "check", broken)
    code, _, err = run("apply", linear(), "-o", "out", "-q")
    assert code == 1
    assert "the rewritten model does not run where the original does" in failures(err)[0]


def test_without_the_targets_runtime_nothing_is_compared(run, monkeypatch):
    monkeypatch.setattr(comparison, "missing", lambda name: f"no {name} here")
    code, out, _ = run("apply", linear(), "-o", "out")
    assert code == 0
    assert "Not compared with the original: no cpu here." in out
    out = run("apply", linear(), "-o", "other", "--target", "webgpu@1.31")[1]
    assert "Not compared with the original: there is no webgpu runtime on this machine." in out


@pytest.mark.parametrize("provider", ["cpu", "reference"])
def test_a_provider_that_is_named_runs_the_comparison(run, provider):
    """Whatever the target: the same way as for a GPU."""
    code, out, err = run("apply", linear(), "-o", "out", "--target", "cuda@1.31", "--provider", provider)
    assert (code, err) == (0, "")
    assert re.search(rf"Against the original \({provider}, random inputs, seed 0\)", out)
    code, out, _ = run("check", "linear.onnx", "out/linear.onnx", "--provider", provider)
    assert code == 0 and f"run by {provider}" in " ".join(out.split())


@pytest.fixture
def no_gpu(monkeypatch):
    """As where the wheel for the CPU is installed, wherever this runs."""
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    runtime._works.cache_clear()
    yield
    runtime._works.cache_clear()


def test_a_provider_that_is_missing_is_said_with_what_to_install(run, no_gpu):
    lacking = 'the installed ONNX Runtime has no CUDAExecutionProvider: pip install "onnxruntime-gpu<'
    code, _, err = run("apply", linear(), "-o", "out", "--provider", "cuda", "-q")
    assert code == 1 and lacking in " ".join(err.split()) and "Traceback" not in err
    code, _, err = run("check", "linear.onnx", "out/linear.onnx", "--provider", "cuda")
    assert code == 2 and lacking in " ".join(err.split())
    code, out, err = run("apply", linear(), "-o", "other", "--target", "cuda@1.31")
    assert (code, err) == (0, "") and lacking in " ".join(out.split())


def test_a_provider_that_there_is_none_of_is_said_first(run, tmp_path):
    code, _, err = run("apply", linear(), "-o", "out", "--provider", "cida")
    assert code == 2 and "unknown runtime 'cida'" in err and "cuda" in err
    assert not (tmp_path / "out").exists()


def test_what_a_killed_run_left_is_named(run, tmp_path):
    (tmp_path / ".out.partial-77").mkdir()
    (tmp_path / ".out.partial-77" / "model.onnx").write_bytes(bytes(1500))
    code, _, err = run("apply", linear(), "-o", "out", "-q", "--no-check")
    assert (code, err) == (0, f"warning: removed what a killed run left: '{tmp_path}/.out.partial-77' (1.50 kB)\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["linear.onnx", "out"]


def test_what_a_killed_run_left_is_gone_on_with(run, tmp_path, monkeypatch):
    given = ("apply", GRANITE, "-o", "out", "-r", "rtn", "-q", "--no-check", "--max-shard-size", "1MB", "--resume")
    with monkeypatch.context() as patched:
        patched.setattr("rewriter.io.saving.verify", interrupted)
        code, _, err = run(*given)
    assert code == 130 and "--resume, in Python resume=True, goes on with it" in err
    code, _, err = run(*given, "--set", "quantization.default.bits=8")
    assert code == 2 and "left by a run with another rule set" in err and err.count("\n") == 1
    code, _, err = run(*given)
    assert code == 0 and err.startswith("warning: went on where a killed run ended: ") and err.count("\n") == 1
    code, _, err = run(*given[:3], "whole", *given[4:])
    assert (code, err) == (0, "") and tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_what_a_size_chose_is_worked_out_anew_and_said_so(run, monkeypatch):
    monkeypatch.setattr("rewriter.cli.budget.fit_to_goal", lambda model, rules, rule_set, *_, **__: (rule_set, None))
    given = ("apply", linear(), "-o", "out", "-q", "--no-check", "--max-shard-size", "1MB", "--resume", "--bits", "5")
    with monkeypatch.context() as patched:
        patched.setattr("rewriter.io.saving.verify", interrupted)
        code, _, err = run(*given)
        assert code == 130, err
    code, _, err = run(*given)
    assert code == 0 and err.startswith("warning: what --size and --bits choose is worked out anew; --write-plan")
    assert "went on where a killed run ended: 1 of 1 weights" in err


def interrupted(*_):
    raise KeyboardInterrupt


def test_a_model_goes_into_a_folder_of_other_things(run, tmp_path):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for name in ("notes.txt", "other.onnx", "sub/notes.txt"):
        (folder / name).write_text("mine")
    before, model = tree(folder), linear()
    code, _, err = run("apply", model, "-o", "folder/new.onnx", "-q")
    assert code == 2
    assert (
        "--overwrite (in Python overwrite=True), which replaces the files that this run writes and leaves all others"
        in err
    )
    for rules in ("rtn", "unstack"):
        assert run("apply", model, "-o", "folder/new.onnx", "-q", "-r", rules, "--overwrite", "--no-check")[0] == 0
    after = tree(folder)
    assert after.pop("new.onnx")
    assert after == before


def _negated(rewrite):
    def wrong(self, op, **matched):
        return op.Neg(rewrite(self, op, **matched))

    return wrong


@pytest.fixture
def wrong_linears(monkeypatch):
    """Rule matmul-to-matmul-nbits changes a sign."""
    right = matmul_to_matmul_nbits.MatMulToMatMulNBits.rewrite
    monkeypatch.setattr(matmul_to_matmul_nbits.MatMulToMatMulNBits, "rewrite", _negated(right))


@pytest.mark.usefixtures("wrong_linears")
def test_a_rewrite_that_fails_its_proof_is_left_out_and_named_first(run, tmp_path):
    code, _, err = run("apply", GRANITE, "-o", "out", "-r", "experts-int4", "--report", "r.json")
    assert code == 1
    first = err.splitlines()[0]
    assert "rule matmul-to-matmul-nbits at node" in first and "the rewrite is wrong and was left out" in first
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["applied"] == {"unstack": 16} and report["declines"][0]["failed"]
    onnx.checker.check_model(onnx.load(tmp_path / "out" / GRANITE.name))


@pytest.mark.usefixtures("wrong_linears")
def test_a_strict_run_ends_there(run, tmp_path):
    code, _, err = run("apply", GRANITE, "-o", "out", "-r", "experts-int4", "--strict")
    assert code == 1 and "the rewrite is wrong" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("wrong_linears")
def test_outputs_far_off_fail_without_a_limit(run):
    code, _, err = run("apply", GRANITE, "-o", "out", "-r", "experts-int4", "--parity", "none")
    assert code == 1 and "is far above what was quantized explains" in err
    unlimited = ("--set", "parity.max_relative_l2=10")
    code, _, err = run("apply", GRANITE, "-o", "other", "-r", "experts-int4", "--parity", "none", *unlimited)
    assert (code, err) == (0, "")


@pytest.mark.parametrize("how", [("--json",), ("--report", "-"), ("--report", "/dev/stdout")], ids=" ".join)
def test_the_report_can_be_printed_and_nothing_else_is(run, tmp_path, how):
    code, out, err = run("apply", GRANITE, "-o", "out", "-r", "unstack", "--no-check", *how)
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["applied"] == {"unstack": 16} and report["parity"]["skipped"] == "--no-check"
    assert [path for path in tree(tmp_path) if not path.startswith("out/")] == []


def test_a_reader_of_the_report_may_stop_early(tmp_path):
    command = [sys.executable, "-m", "rewriter", "apply", GRANITE, "-o", "out", "-r", "unstack", "--no-check"]
    with subprocess.Popen(
        [*map(str, command), "--report", "/dev/stdout"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"{\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_a_report_may_go_into_a_pipe(run, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as reader:
        text = reader.submit((tmp_path / "pipe").read_text)
        assert run("apply", GRANITE, "-o", "out", "-r", "unstack", "--no-check", "-q", "--report", "pipe")[0] == 0
        assert json.loads(text.result(timeout=60))["applied"] == {"unstack": 16}


def test_progress_names_each_phase_as_it_begins():
    told = []
    rewriter.apply(GRANITE, "moe-int4", progress=lambda phase, count: told.append(phase), prover=lambda *_: None)
    assert told[:3] == ["fuse", "unstack", "unbatch"] and told[-1] == "quantize"


def test_apply_says_that_activations_may_be_rounded(run):
    accepted = r"Kernels may round activations to 8 bits \(accuracy_level: 4\)\."
    assert re.search(accepted, run("apply", linear(), "-o", "out", "--set", "accuracy_level=4", "--html", "r.html")[1])
    assert "accuracy_level: 4" in Path("r.html").read_text()
    assert not re.search("round activations", run("apply", linear(), "-o", "other")[1])
    assert re.search(r"^activations +rounded true", run("rules", "moe-int4")[1], re.MULTILINE) is None
