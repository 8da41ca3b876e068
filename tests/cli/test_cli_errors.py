"""One clear line for everything that can go wrong, and nothing left behind."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from cli_models import GRANITE, MODELS, linear, tree

from rewriter import api


def not_onnx():
    Path("m.onnx").write_bytes(b"no model at all")
    return "m.onnx"


def empty():
    Path("m.onnx").touch()
    return "m.onnx"


def no_imports():
    model = onnx.load(linear())
    model.ClearField("opset_import")
    Path("m.onnx").write_bytes(model.SerializeToString())
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
    "no imports": (no_imports, r"m.onnx' does not say which operators it imports"),
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
    "unknown role": (
        lambda: yaml("extends: moe-int4\nquantization: {exclude: [{role: rooter}]}\n"),
        r"set.yaml:2:\d+: role pattern 'rooter' matches no role \(did you mean 'router'\?\)",
    ),
    "no set file": (lambda: (GRANITE, "-r", "./no.yaml"), r"rule set file '.*no.yaml' does not exist"),
    "unknown set": (lambda: (GRANITE, "-r", "moe-in4"), r"unknown rule set 'moe-in4' \(did you mean 'moe-int4'\?\)"),
    "unknown key": (
        lambda: (GRANITE, "--set", "quantisation.default.bits=8"),
        r"unknown key 'quantisation' \(did you mean 'quantization'\?\)",
    ),
    "bad value": (lambda: (GRANITE, "--set", "quantization.default.bits=5"), r"'bits' should be 2, 3, 4 or 8, not 5"),
    "no value": (lambda: (GRANITE, "--set", "bits"), r"override 'bits' is not of the form key=value"),
    "twice": (lambda: (GRANITE, "--set", "target=cpu", "--set", "target=cuda"), r"--set target is given twice"),
    "target": (lambda: (GRANITE, "--target", "cudda"), r"unknown provider 'cudda'.*'cuda'"),
    "required": (lambda: (GRANITE, "--require", "unstac"), r"--require unstac: .*no such rule \(.* 'unstack'"),
    "parity": (lambda: (GRANITE, "--parity", "clas"), r"'clas' is not one of 'class', 'all', 'none'"),
    "size": (lambda: (GRANITE, "--memory", "lots"), r"--memory': 'lots' is not a size, as 512MiB"),
    "bits": (lambda: (GRANITE, "--bits", "nan"), r"--bits': 'nan' is no finite number"),
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
        (("explain", GRANITE, "lm_head.weigt_t"), r"no node, weight or role 'lm_head.weigt_t' \(.* 'lm_head.weight_t'"),
        (("explain", GRANITE, "%%%"), r"no node, weight or role '%%%'; without a name"),
        (("check", GRANITE, GRANITE, "--runtime", "cdua"), r"unknown runtime 'cdua' \(did you mean 'cuda'\?\)"),
        (("check", GRANITE, GRANITE, "--inputs", "no.npz"), r"there is no file 'no.npz'"),
        (("check", GRANITE, GRANITE, "--inputs", GRANITE), r"is not an .npz file of plain arrays"),
        (("check", GRANITE, GRANITE, "--logits", "logit"), r"no such output \(did you mean 'logits'\?\)"),
        (("check", GRANITE, GRANITE, "--min-top1", "2"), r"--min-top1"),
        (("check", GRANITE, GRANITE, "--min-snr-db", "nan"), r"'nan' is no finite number"),
        (
            ("inspect", GRANITE, "--target", "cpuu"),
            r"unknown provider 'cpuu' in target 'cpuu' \(did you mean 'cpu'\?\)",
        ),
        (("explain", GRANITE, "--set", "parity.local=foo"), r"'local' should be 'class', 'all' or 'none', not 'foo'"),
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


HOSTILE_NAMES = {"escape": "w\x1b[2J\x1b]0;mine\x07", "bidi": "w\u202eabc", "backspace": "w\b\b", "long": "w" * 100_000}


@pytest.mark.parametrize("name", HOSTILE_NAMES.values(), ids=HOSTILE_NAMES.keys())
def test_names_cannot_write_on_the_terminal(run, name):
    model = linear(weight_name=name, node=name)
    shown = name.encode("unicode_escape").decode() if len(name) < 99 else "w" * 100 + "..." + "w" * 100
    for arguments in (("apply", model, "-o", "out"), ("explain", model), ("explain", model, name), ("inspect", model)):
        code, out, err = run(*arguments)
        assert (code, err) == (0, "")
        assert not re.search("[^\\x20-\\x7e\n─→…]", out.replace("·", ""))
        assert len(out) < 20_000
        assert shown[:6] in out or arguments[-1] != name or "\b" in name  # which is left out
    code, _, err = run("explain", model, name + "x")
    assert code == 2
    assert re.fullmatch(r"error: [\x20-\x7e]{10,1500}\n", err)


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(12, "Cannot allocate memory"), RuntimeError("can't start new thread")]
)
def test_too_little_memory_is_one_line_with_what_helps(run, monkeypatch, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(api, "apply", fails)
    said = "error: out of memory; give --memory a smaller size, or run on a larger machine\n"
    assert run("apply", GRANITE, "-o", "out") == (2, "", said)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("--block-size", "64"), "write --set quantization.default.block_size=64"),
        (("--block-size=256",), "write --set quantization.default.block_size=256"),
        (("--block-size",), "write --set quantization.default.block_size=128"),
        (("--device", "webgpu"), "write --target webgpu"),
        (("--symmetric",), "write --set quantization.default.symmetric=true"),
        (("--bits", "8"), "write --set quantization.default.bits=8"),
        (("--target", "gpu"), "did you mean 'cuda'"),
    ],
)
def test_what_people_try_is_answered_with_what_to_write(run, arguments, hint):
    code, _, err = run("explain", GRANITE, *arguments)
    assert code == 2 and hint in err
