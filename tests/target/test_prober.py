"""The prober judges runtimes, so its own numbers are held to what is known without it."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import zipapp
from pathlib import Path

import numpy as np
import pytest
from probe import answers, apart, cases, codes, forms, sweep

ROOT = Path(__file__).parents[2]


def test_forms_read_as_they_are_written():
    every = sweep.forms()
    assert [forms.form_of(forms.text_of(form)) for form in every] == every
    assert forms.text_of(forms.QMoEForm(x="FLOAT16", bits=(4, 8), fc3=True)) == "QMoE x=FLOAT16 fc3=1 bits=4,8"


@pytest.mark.parametrize("text", ["Conv", "QMoE colour=red", "MatMulNBits bits"])
def test_what_is_no_form(text):
    with pytest.raises(ValueError, match=text.split()[-1]):
        forms.form_of(text)


def test_the_sweep_covers_each_setting_of_each_operator():
    for kind in (forms.LinearForm, forms.LookupForm, forms.MoEForm, forms.QMoEForm):
        own = [form for form in sweep.forms() if type(form) is kind]
        for field in dataclasses.fields(kind):
            assert len({getattr(form, field.name) for form in own}) > 1, (kind.operator, field.name)


@pytest.mark.parametrize(("bits", "sm"), [(4, 80), (4, 90), (8, 80), (8, 90)])
def test_its_own_cutlass_layout_is_the_runtimes(bits, sm):
    """Raw and packed pairs that ONNX Runtime's own packer made."""
    golden = np.load(ROOT / "tests" / "data" / "qmoe_prepack_golden.npz")
    pairs = 0
    for name in golden.files:
        if not name.endswith("_raw") or f"bits{bits}_sm{sm}_" not in name:
            continue
        raw, packed = golden[name], golden[name.removesuffix("_raw") + "_packed"]
        low = np.stack([raw & 15, raw >> 4], axis=-1).reshape(len(raw), -1) if bits == 4 else raw
        np.testing.assert_array_equal(codes.cutlass(low, bits, sm), packed.reshape(low.shape[1], -1))
        pairs += 1
    assert pairs


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_packed_low_bits_first(bits):
    own = np.random.default_rng(bits).integers(0, 2**bits, (3, 24))
    stream = [int(code) >> bit & 1 for row in own for code in row for bit in range(bits)]
    read = [int(byte) >> bit & 1 for byte in codes.packed(own, bits).reshape(-1) for bit in range(8)]
    assert read == stream


def test_bfloat16_rounds_to_the_nearest_even():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    expected = values.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(codes.rounded(values, "BFLOAT16"), expected.astype(np.float32))
    assert codes.stored(values, "BFLOAT16") == expected.tobytes()


PLAIN = ("QMoE", "MoE fc3=0", "MatMulNBits zeros=packed", "GatherBlockQuantized rank=3 bits=8")


def test_a_runtime_that_is_right_is_found_right():
    pytest.importorskip("onnxruntime")
    own = [forms.form_of(text) for text in PLAIN]
    for form, answer in zip(own, apart.answers(own, "cpu", 1, lambda *_: None), strict=True):
        assert answers.Answer(form, answer["error"]).verdict("cpu") == "right", answer


@pytest.mark.parametrize(
    ("text", "change", "verdict"),
    [
        ("QMoE", {"bias": "all"}, "wrong"),
        ("QMoE zeros=all", {"zeros": "none"}, "wrong"),
        ("QMoE bits=8,8 block=0 zeros=all", {"zeros": "fc1"}, "wrong"),
        ("MoE act=gelu fusion=0", {"act": "silu"}, "wrong"),
        ("MoE", {"top": 3}, "wrong"),
        ("QMoE constants=1.702,1,7", {"constants": "1,0,inf"}, "wrong"),
        ("MatMulNBits level=4", {}, "rounds"),
    ],
)
def test_a_runtime_that_computes_otherwise_is_found_out(text, change, verdict, monkeypatch):
    """A runtime that takes one form for another, as kernels do that ignore a slot or an attribute."""
    pytest.importorskip("onnxruntime")
    form = forms.form_of(text)
    make = cases.case_of

    def other(asked, attributes):
        own = make(dataclasses.replace(asked, **change), attributes)
        return cases.Case(own.model, make(asked, attributes).run)

    monkeypatch.setattr(apart, "case_of", other)
    monkeypatch.setattr(cases, "_seed", lambda _: 1)
    (answer,) = apart.answers([form], "cpu", 1, lambda *_: None)
    assert answers.Answer(form, answer["error"]).verdict("cpu") == verdict, answer


def test_a_form_that_crashes_or_is_refused_takes_nothing_down(monkeypatch):
    pytest.importorskip("onnxruntime")
    make = cases.case_of

    def crash(form, attributes):
        if form.bits == (8, 8):
            os.kill(os.getpid(), signal.SIGKILL)
        return make(form, attributes)

    monkeypatch.setattr(apart, "case_of", crash)
    own = [forms.form_of(text) for text in ("QMoE bits=8,8", "QMoE fusion=2", "QMoE fc3=1 fusion=0", "QMoE")]
    crashed, refused, _, right = apart.answers(own, "cpu", 2, lambda *_: None)
    assert crashed == {"crash": "SIGKILL"}
    assert "swiglu_fusion" in refused["load"]
    assert right["error"] < 1e-5


def test_it_runs_as_one_file_and_answers_with_one(tmp_path):
    pytest.importorskip("onnxruntime")
    prober = tmp_path / "prober.pyz"
    zipapp.create_archive(ROOT / "benchmarks" / "prober", prober)
    command = [
        sys.executable,
        "-I",
        str(prober),
        "--only",
        "MatMulNBits",
        "block=256",
        "x=BFLOAT16",
        "--out",
        str(tmp_path),
    ]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert "{'refused': 8}" in found.stdout


def test_answers_read_as_they_are_written(tmp_path):
    own = (
        answers.Answer(forms.form_of("QMoE"), 1.5e-7),
        answers.Answer(forms.form_of("QMoE bits=2,2"), float("inf")),
        answers.Answer(forms.form_of("QMoE fc3=1"), None, 'load: it said "no"'),
    )
    found = answers.Answers("cuda", "1.31.1", "NVIDIA H200", "2026-11-26", own)
    answers.write(tmp_path, found)
    answers.write(tmp_path, dataclasses.replace(found, answers=(dataclasses.replace(own[0], error=2.5e-7),)))
    (read,) = answers.read_all(tmp_path)
    assert found.name == "cuda-1.31.1-nvidia-h200.json"
    said = {answer.form: answer for answer in read.answers}
    assert [said[o.form].verdict("cuda") for o in own] == ["right", "wrong", "refused"]
    assert said[own[2].form] == own[2] and said[own[0].form].error == 2.5e-7


def test_of_a_later_version_only_what_differs_is_written(tmp_path):
    """And what is measured anew of the one before changes nothing of it."""
    one, two, three = (forms.form_of(f"MatMulNBits k={k}") for k in (32, 64, 96))
    first = answers.Answers("cpu", "1.9.0", "X", "", (answers.Answer(one, 1e-7), answers.Answer(two, 2e-7)))
    second = dataclasses.replace(
        first, version="1.10.0", answers=(answers.Answer(one, 1e-7), answers.Answer(three, None, "load: no"))
    )
    answers.write(tmp_path, first)
    path = answers.write(tmp_path, second)
    assert json.loads(path.read_text())["answers"] == {"MatMulNBits k=64": None, "MatMulNBits k=96": "0"}
    answers.write(tmp_path, dataclasses.replace(first, answers=(answers.Answer(one, 3e-7),)))
    later, before = answers.read_all(tmp_path)
    assert set(later.answers) == set(second.answers)
    assert set(before.answers) == {answers.Answer(one, 3e-7), answers.Answer(two, 2e-7)}


def test_forms_of_a_file_are_measured_in_place_of_the_sweep(tmp_path):
    (tmp_path / "forms.txt").write_text("MatMulNBits k=96\nGatherBlockQuantized bits=8 k=96\n")
    command = [sys.executable, ROOT / "benchmarks" / "prober", "--forms", tmp_path / "forms.txt", "--out", tmp_path]
    subprocess.run(command, check=True, capture_output=True)
    (found,) = answers.read_all(tmp_path)
    told = {forms.text_of(own.form): own.verdict("cpu") for own in found.answers}
    assert told == {"MatMulNBits k=96": "right", "GatherBlockQuantized bits=8 k=96": "right"}
