"""The command line: what it prints, what it writes, and one clear line for everything that can go wrong."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rewriter import api, ruleset
from rewriter.cli import main, options, show, whole
from rewriter.cli.console import console
from rewriter.errors import TargetError
from rewriter.report import Decline, Report
from rewriter.wording import nbytes, shrink

MODELS = Path(__file__).parent / "models"
GRANITE = MODELS / "mobius" / "granitemoehybrid_static_unroll_f32.onnx"
NEEDS_FC3 = MODELS / "genai_old" / "phimoe_int4_cuda_071.onnx"
STACK = "model.layers.0.block_sparse_moe.input_linear.weight"
ROUTER = "model/layers.0/block_sparse_moe/gate/MatMul_node_44"


@pytest.fixture(autouse=True)
def _plain(monkeypatch, tmp_path):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.delenv("REWRITER_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(capsys):
    """Runs the command line in this process; returns exit code, stdout and stderr."""

    def call(*arguments):
        code = main([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def rewritten(tmp_path_factory):
    """Granite by experts-int4, once for all tests that only read it."""
    directory = tmp_path_factory.mktemp("rewritten") / "out"
    assert main(["apply", str(GRANITE), "-o", str(directory), "-r", "experts-int4", "-q", "--no-check"]) == 0
    return directory


def linear(path=Path("linear.onnx"), *, weight=None, weight_name="w", node="n", external="", size=None):
    """Writes y = x @ w, w [64, 32], its weight in a data file where ``external`` names one."""
    values = np.arange(64 * 32, dtype=np.float32).reshape(64, 32) if weight is None else weight
    tensor = numpy_helper.from_array(values, weight_name)
    if external:
        raw = tensor.raw_data
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", external), ("offset", "0"), ("length", str(len(raw)))):
            tensor.external_data.add(key=key, value=value)
        if size is not None:
            (path.parent / "w.data").write_bytes(raw[:size])
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", weight_name], ["y"], node)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 32])],
        [tensor],
    )
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    path.write_bytes(model.SerializeToString())
    return path


def tree(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


# apply


def test_apply_writes_a_model_and_says_what_it_did(run, tmp_path):
    before = GRANITE.read_bytes()
    code, out, err = run("apply", GRANITE, "-o", "out", "--rules", "experts-int4", "--report", "out/report.json")
    assert (code, err) == (0, "")
    assert sorted(tree(tmp_path)) == ["out/granitemoehybrid_static_unroll_f32.onnx", "out/report.json"]
    assert GRANITE.read_bytes() == before
    onnx.checker.check_model(onnx.load(tmp_path / "out" / GRANITE.name).graph.name and str(GRANITE))
    for words in (
        r"experts-int4 on .*granite.*, for cpu@",
        r"unstack +16 +0 +2 classes run",
        r"matmul-to-matmul-nbits +\d+ +\S+ +\d+ class(es)? run",
        r"matmul-to-matmul-nbits +not included by the plan .* \d+ +model/layers",
        r"expert.gate_up +8 +4 +5.000 +131.1 kB +20.5 kB +\d\.\d\d% +\d\.\d\d% +model\.layers",
        r"Against the original \((cpu|reference), random inputs, seed 0\)",
        r"logits +0?\.\d+",
        r"Size +666.9 kB -> \d+\.\d kB \(\d\.\dx smaller\)",
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


# apply: exit code 1


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
    monkeypatch.setattr(whole, "LARGEST", 100)
    model = linear()
    assert "has 8.2 kB of weights (--check compares all the same)" in run("apply", model, "-o", "3")[1]
    assert "Against the original" in run("apply", model, "-o", "4", "--check")[1]
    monkeypatch.setattr(whole, "LARGEST", 1 << 30)
    monkeypatch.setattr(whole, "MOST_NODES", 0)
    assert "the model has 1 nodes (--check" in run("apply", model, "-o", "6")[1]
    assert "Against the original" in run("apply", model, "-o", "5", "--set", "parity.min_snr_db=1")[1]


def test_a_rewritten_model_that_does_not_run_fails(run, monkeypatch):
    def broken(self, *args, **kwargs):
        raise TargetError("ONNX Runtime (cpu) cannot load the model: no")

    monkeypatch.setattr(api.Result, "check", broken)
    code, _, err = run("apply", linear(), "-o", "out", "-q")
    assert code == 1
    assert "the rewritten model does not run where the original does" in failures(err)[0]


def test_without_the_targets_runtime_nothing_is_compared(run, monkeypatch):
    monkeypatch.setattr(whole, "available", lambda: ("reference",))
    code, out, _ = run("apply", linear(), "-o", "out")
    assert code == 0
    assert "Not compared with the original: there is no cpu runtime on this machine." in out


# exit code 2: one line, nothing written


def not_onnx():
    Path("m.onnx").write_bytes(b"no model at all")
    return "m.onnx"


def empty():
    Path("m.onnx").touch()
    return "m.onnx"


def yaml(text):
    Path("set.yaml").write_text(text)
    return GRANITE, "-r", "set.yaml"


def report_over(name, content):
    Path(name).write_text(content)
    return linear(), "--report", name


def blocked():
    Path("file").touch()
    return linear(), "-o", "file/out"


def read_only():
    Path("locked").mkdir(mode=0o555)
    return linear(), "-o", "locked/out"


BAD = {
    "no file": (lambda: "nowhere.onnx", r"there is no file 'nowhere.onnx'"),
    "no ONNX": (not_onnx, r"m.onnx' is not an ONNX model"),
    "empty": (empty, r"m.onnx' is not an ONNX model.*the file is empty"),
    "no model in it": (lambda: Path().absolute(), r"holds no .onnx file"),
    "data missing": (lambda: linear(external="w.data"), r"initializer 'w'.*w.data' cannot be read.*put it beside"),
    "data truncated": (lambda: linear(external="w.data", size=100), r"initializer 'w'.*is truncated: it has 100 bytes"),
    "data outside": (lambda: linear(external="../w.data"), r"'../w.data' is outside the model's directory"),
    "data anywhere": (lambda: linear(external="/etc/hostname"), r"'/etc/hostname' is outside the model's directory"),
    "invalid": (
        lambda: MODELS / "mobius" / "gemma4_fused_moe_pre324_malformed_f32.onnx",
        r"node 'model/layers.0/MoE_node_93' \(com.microsoft::MoE\): required input",
    ),
    "not finite": (lambda: linear(weight=np.full((64, 32), np.nan, np.float32)), r"weight 'w' holds NaN or infinity"),
    "YAML typo": (lambda: yaml("extends: unstack\nphazes: []\n"), r"set.yaml:2:1: unknown key 'phazes'.*'phases'"),
    "no YAML": (lambda: yaml("phases: [\n"), r"set.yaml:2:1: not valid YAML"),
    "unknown rule": (
        lambda: yaml("phases:\n  - name: a\n    rules: [unstak]\n"),
        r"set.yaml:3:13: unknown rule 'unstak' \(did you mean 'unstack'\?\)",
    ),
    "unknown option": (
        lambda: yaml("phases:\n  - name: a\n    rules:\n      - matmul-to-matmul-nbits: {acuracy_level: 4}\n"),
        r"set.yaml:4:\d+: unknown option 'acuracy_level'.*'accuracy_level'",
    ),
    "unknown name": (
        lambda: yaml("extends: moe-int4\nquantization: {exclude: [{weights: lm_hed.weight_t}]}\n"),
        r"weight pattern 'lm_hed.weight_t' matches nothing in the model \(did you mean 'lm_head.weight_t'\?\)",
    ),
    "no set file": (lambda: (GRANITE, "-r", "./no.yaml"), r"rule set file '.*no.yaml' does not exist"),
    "unknown set": (lambda: (GRANITE, "-r", "moe-in4"), r"unknown rule set 'moe-in4' \(did you mean 'moe-int4'\?\)"),
    "unknown key": (
        lambda: (GRANITE, "--set", "quantisation.default.bits=8"),
        r"unknown key 'quantisation' \(did you mean 'quantization'\?\)",
    ),
    "bad value": (lambda: (GRANITE, "--set", "quantization.default.bits=5"), r"'bits' should be 2, 4 or 8, not 5"),
    "no value": (lambda: (GRANITE, "--set", "bits"), r"override 'bits' is not of the form key=value"),
    "twice": (lambda: (GRANITE, "--set", "target=cpu", "--set", "target=cuda"), r"--set target is given twice"),
    "target": (lambda: (GRANITE, "--target", "cudda"), r"unknown provider 'cudda'.*'cuda'"),
    "required": (lambda: (GRANITE, "--require", "unstac"), r"--require unstac: .*no such rule \(.* 'unstack'"),
    "parity": (lambda: (GRANITE, "--parity", "clas"), r"'clas' is not one of 'class', 'all', 'none'"),
    "size": (lambda: (GRANITE, "--memory", "lots"), r"--memory': 'lots' is not a size, as 512MiB"),
    "option": (lambda: (GRANITE, "--overwrit"), r"no such option '--overwrit' \(did you mean '--overwrite'\?\); see"),
    "argument": (lambda: (GRANITE, "another"), r"got unexpected extra argument.*another"),
    "report nowhere": (lambda: (GRANITE, "--report", "no/r.json"), r"there is no directory 'no'; make it first"),
    "report is a directory": (lambda: (GRANITE, "--report", "."), r"the report '.' is a directory"),
    "report over text": (lambda: report_over("notes", "hello"), r"'notes' exists and is no report"),
    "report over JSON": (lambda: report_over("config.json", "{}"), r"'config.json' exists and is no report"),
    "output below a file": (blocked, r"cannot write '.*out': a part of the path is"),
    "output read-only": pytest.param(
        read_only,
        r"cannot write '.*out': permission denied; choose another place",
        marks=pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere"),
    ),
    "output is a file": (lambda: (GRANITE, "-o", blocked()[2].split("/")[0]), r"the output '.*file' is a file; give"),
    "output is no directory": (lambda: (GRANITE, "-o", "m.onnx"), r"the output 'm.onnx' needs a directory, as -o m or"),
    "output holds the input": (lambda: (linear(), "-o", ".", "--overwrite"), r"(holds the input|working directory)"),
}


@pytest.mark.parametrize(("given", "words"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_leaves_nothing(run, tmp_path, given, words):
    arguments = given()
    arguments = arguments if isinstance(arguments, tuple) else (arguments,)
    before = tree(tmp_path)
    output = () if "-o" in arguments else ("-o", "made/out")
    code, out, err = run("apply", *arguments, *output)
    assert (code, out) == (2, ""), err
    assert re.fullmatch(r"error: [^\n]+\n", err)
    assert re.search(words, err)
    assert tree(tmp_path) == before
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("aply", "m"), r"no such command 'aply' \(did you mean 'apply'\?\); see rewriter --help"),
        (("apply", "m"), r"missing option '--out' / '-o'; see rewriter apply --help"),
        (("check", "m"), r"missing argument 'AFTER'; see rewriter check --help"),
        (("rules", "moeint4"), r"there is no rule or rule set 'moeint4' \(did you mean 'moe-int4'\?\)"),
        (("rules", "--schema", "--json"), r"--schema goes with neither"),
        (("explain", GRANITE, "lm_head.weigt_t"), r"no node or weight 'lm_head.weigt_t' \(.* 'lm_head.weight_t'"),
        (("explain", GRANITE, "%%%"), r"no node or weight '%%%'; without a name"),
        (("check", GRANITE, GRANITE, "--runtime", "cdua"), r"unknown runtime 'cdua' \(did you mean 'cuda'\?\)"),
        (("check", GRANITE, GRANITE, "--inputs", "no.npz"), r"there is no file 'no.npz'"),
        (("check", GRANITE, GRANITE, "--inputs", GRANITE), r"is not an .npz file of plain arrays"),
        (("check", GRANITE, GRANITE, "--logits", "logit"), r"no such output \(did you mean 'logits'\?\)"),
        (("check", GRANITE, GRANITE, "--min-top1", "2"), r"--min-top1"),
    ],
)
def test_bad_usage_is_one_line(run, arguments, words):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", err)
    assert re.search(words, err)


def test_what_nobody_expected_is_one_line_with_the_way_to_the_traceback(run, monkeypatch):
    def broken(*args, **kwargs):
        raise KeyError("a\nb")

    monkeypatch.setattr(api, "apply", broken)
    code, _, err = run("apply", GRANITE, "-o", "out")
    assert code == 2
    assert re.fullmatch(r"error: internal: KeyError: [^\n]+REWRITER_DEBUG=1 shows the traceback[^\n]+\n", err)
    monkeypatch.setenv("REWRITER_DEBUG", "1")
    assert "Traceback" in run("apply", GRANITE, "-o", "out")[2]
    assert "UsageError" in run("rules", "x")[2]


def test_an_interrupted_run_leaves_nothing(run, tmp_path, monkeypatch):
    def interrupt(self, count):
        raise KeyboardInterrupt

    monkeypatch.setattr("rewriter.io.streaming.Meter.add", interrupt)
    assert run("apply", GRANITE, "-o", "deep/out", "--report", "r.json") == (130, "", "error: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_a_report_is_written_whole_or_not_at_all(run, tmp_path, monkeypatch):
    model = linear()
    assert run("apply", model, "-o", "1", "--report", "r.json", "-q")[0] == 0
    first = (tmp_path / "r.json").read_bytes()

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    code, _, err = run("apply", model, "-o", "2", "--report", "r.json", "-q", "-r", "unstack")
    assert code == 2
    assert "cannot write the report 'r.json' (No space left on device)" in err
    assert (tmp_path / "r.json").read_bytes() == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "linear.onnx", "r.json"]


# explain


def test_explain_says_what_would_happen_and_writes_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr("rewriter.quantize.job.QuantizationJob.quantize", pytest.fail)
    monkeypatch.setattr("rewriter.parity.local.LocalProver.__call__", pytest.fail)
    code, out, err = run("explain", GRANITE, "-r", "experts-int4")
    assert (code, err, tree(tmp_path)) == (0, "", {})
    for words in (
        r"a dry run, nothing is written",
        r"unstack +16 +model/layers.0/",
        r"not included by the plan \(role router\) +2",
        r"expert.down +8 +4 +5.000 +65.5 kB +10.2 kB",
        r"lm_head.weight_t +131.1 kB +MatMul +not included by the plan \(role lm_head\)",
        r"and \d+ more, ",
    ):
        assert re.search(words, out), words


def test_the_forecast_is_what_apply_makes(run):
    forecast = run("explain", GRANITE)[1].splitlines()[-1]
    assert forecast == next(x for x in run("apply", GRANITE, "-o", "o")[1].splitlines() if x.startswith("Size"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (ROUTER, (r"node, MatMul, router, layer 0", r"stopped by +not included by the plan \(role router\)")),
        (STACK, (r"weight, FLOAT\[4, 64, 64\], disappears", r"unstack +4", r"matmul-to-matmul-nbits +4")),
        (f"{STACK}__slice_2", (r"slice, \[64, 64\], to 4 bits in blocks of 32", r"matmul-to-matmul-nbits +1")),
        ("lm_head.weight_t", (r"weight, FLOAT\[64, 512\], stays", r"not included by the plan \(role lm_head\)")),
        ("model.rotary_emb.cos_cache", (r"weight, FLOAT\[\d+, \d+\], stays", r"something else: unstack")),
        ("logits", (r"logits  node, ",)),
    ],
)
def test_explain_one_name(run, name, words):
    code, out, _ = run("explain", GRANITE, name, "-r", "experts-int4")
    assert code == 0
    assert out.startswith(name)
    for expected in words:
        assert re.search(expected, out), expected


def test_explain_names_what_is_at_fault(run):
    model = MODELS / "genai" / "gemma4_moe_fp32_cpu_b32.onnx"
    out = run("explain", model, "lm_head.MatMul.weight", "-r", "unstack")[1]
    assert "is still read whole" in out
    assert re.search("at fault +'/lm_head/MatMul', MatMul node", out)


# rules


def test_rules_lists_everything_that_is_installed(run):
    code, out, _ = run("rules")
    assert code == 0
    for name in (*(r.name for r in ruleset.catalogue()), *ruleset.rule_sets()):
        assert re.search(rf"^{name} +\S", out, re.MULTILINE), name


def test_rules_shows_one_in_full(run):
    out = run("rules", "matmul-to-matmul-nbits")[1]
    for words in ("Matched\n  MatMul(x, w)", "Replacement\n", "Declines when\n", "Source\n"):
        assert words in out
    assert re.search(r"accuracy_level +Literal\[0, 1, 2, 3, 4\] +0 +0 leaves it to the runtime", out)
    out = run("rules", "experts-int8")[1]
    assert re.search(r"^plan +8 bits, blocks of 32, symmetric", out, re.MULTILINE)
    assert re.search(r"^unstack +unstack", out, re.MULTILINE)
    assert "role expert.*" in out
    out = run("rules", "unstack")[1]
    assert "rule, from package rules" in out
    assert "rule set, from package rules" in out


def test_rules_speaks_json(run):
    data = json.loads(run("rules", "--json")[1])
    assert [r["name"] for r in data["rules"]] == [r.name for r in ruleset.catalogue()]
    assert [r["name"] for r in data["rule_sets"]] == list(ruleset.rule_sets())
    one = json.loads(run("rules", "matmul-to-matmul-nbits", "--json")[1])
    assert one["rules"][0]["options"][0]["schema"] == {"enum": [0, 1, 2, 3, 4], "type": "integer"}
    assert one["rule_sets"] == []
    assert json.loads(run("rules", "--schema")[1]) == ruleset.json_schema()


# check


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


def test_models_with_other_outputs_fail_the_comparison(run):
    code, out, err = run("check", GRANITE, linear())
    assert (code, out) == (1, "")
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
    assert "output 'y' is not finite" in err


# the rest


def test_version_and_help(run):
    assert re.match(r"onnx-moe-rewriter \d+\.\d+\.\d+ \(.*onnx-ir ", run("--version")[1])
    assert "rewriter apply model.onnx -o out" in run("--help")[1]
    for command in ("apply", "explain", "check", "rules"):
        code, out, _ = run(command, "-h")
        assert code == 0
        assert f"rewriter {command}" in out
    code, out, err = run()
    assert (code, err) == (2, "")
    assert "Usage" in out


def test_the_default_rule_set_is_that_of_the_api():
    assert options.DEFAULT_RULES == api.DEFAULT_RULES


def test_help_and_completion_load_nothing_heavy():
    heavy = "{'numpy', 'onnx', 'onnx_ir', 'onnxscript', 'onnxruntime', 'numba', 'pydantic'}"
    code = f"import sys; from rewriter.cli import main; main(['--help']); sys.exit(str({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "set()"


def test_names_are_completed():
    assert "moe-int4" in options.complete_rule_sets("moe")
    assert options.complete_rules("unst") == ["unstack"]
    assert "moe-int8" in options.complete_rules_and_sets("moe-int")


def test_progress_is_shown_on_a_terminal_only(tmp_path):
    model = linear()
    host, guest = pty.openpty()
    command = [sys.executable, "-m", "rewriter", "apply", str(model), "-o", "out", "--no-check"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=guest, text=True) as process:
        os.close(guest)
        out, _ = process.communicate(timeout=60)
    shown = os.read(host, 1 << 16).decode()
    os.close(host)
    assert process.returncode == 0
    assert "writing out" in shown
    assert "writing" not in out


def test_a_reader_that_leaves_early_is_no_failure():
    command = f"{sys.executable} -m rewriter rules | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_long_tables_are_cut(capsys):
    declines = tuple(Decline("r", "p", "n", f"reason {i}", "") for i in range(44))
    show.show(console(), show.declined(Report("s", "t", declines=declines), "; see r.json"))
    out = capsys.readouterr().out
    assert "and 34 more; see r.json" in out
    assert len(out.splitlines()) < 16


@pytest.mark.parametrize(
    ("text", "count"),
    [("1048576", 1 << 20), ("512MiB", 512 << 20), ("2GB", 2 * 10**9), ("1.5g", 15 * 10**8), ("4 KiB", 4096)],
)
def test_sizes_are_read(text, count):
    assert options.size(text) == count


def test_sizes_are_written():
    assert [nbytes(n) for n in (0, 999, 1000, 51_000_000_000, 2e12)] == ["0 B", "999 B", "1.0 kB", "51.0 GB", "2.0 TB"]
    assert shrink(51_000_000_000, 13_000_000_000) == "51.0 GB -> 13.0 GB (3.9x smaller)"
    assert shrink(10, 10) == "10 B -> 10 B"
    assert shrink(10, 20) == "10 B -> 20 B (2.0x larger)"
