"""What a written model and a report say of where they come from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import onnx
import pytest

import rewriter
from rewriter.cli import main
from rewriter.report.provenance import KEY, Provenance, made_by

GRANITE = Path(__file__).parent / "models" / "mobius" / "granitemoehybrid_static_unroll_f32.onnx"
FAST = {"parity.local": "none"}


def metadata(file):
    return {entry.key: entry.value for entry in onnx.load(file).metadata_props}


def test_a_written_model_says_what_made_it(tmp_path):
    file = rewriter.apply(GRANITE, "unstack", target="cpu@1.31", overrides=FAST).save(tmp_path / "a")
    (made,) = made_by(metadata(file))
    assert (made.version, made.rule_set, made.target) == (rewriter.__version__, "unstack", "cpu@1.31")
    assert made.digest == hashlib.sha256(made.rules.encode()).hexdigest()
    assert json.loads(made.rules)["phases"] == [["unstack", [["unstack", {}]]]]
    again = rewriter.apply(file, "experts-int4", overrides=FAST)
    assert again.report.provenance.before == (made,)
    second = made_by(metadata(again.save(tmp_path / "b")))
    assert [entry.rule_set for entry in second] == ["unstack", "experts-int4"]
    assert rewriter.inspect(tmp_path / "b").made == second


def test_the_same_model_and_rule_set_give_the_same_bytes_at_any_time(tmp_path, monkeypatch):
    files = []
    for name, epoch in (("a", "0"), ("b", "86400")):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
        result = rewriter.apply(GRANITE, "experts-int4", overrides=FAST)
        files.append(result.save(tmp_path / name))
        assert result.report.provenance.date == f"1970-01-0{1 + int(epoch) // 86400}T00:00:00+00:00"
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_digest_tells_rule_sets_apart():
    plain, eight = (
        rewriter.apply(GRANITE, "experts-int4", overrides={**FAST, **more}).report.provenance.digest
        for more in ({}, {"quantization.default.bits": 8})
    )
    assert plain != eight


def test_where_nothing_fired_the_model_stays_as_it_was(tmp_path):
    dense = GRANITE.parent / "llama_tied_dense_f32.onnx"
    result = rewriter.apply(dense, "unstack", overrides=FAST)
    assert not result.report.applications
    assert KEY not in metadata(result.save(tmp_path / "out"))


@pytest.mark.parametrize("text", ["", "no JSON", "[1]", '[{"version": 1}]', "{}", '"x"'])
def test_metadata_of_others_is_ignored(text):
    assert made_by({KEY: text}) == ()


def test_the_command_line_says_what_was_done_before(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rewriter.apply(GRANITE, "unstack", overrides=FAST).save("a")
    assert main(["inspect", "a", "--no-sizes"]) == 0
    assert "rewritten   unstack (" in capsys.readouterr().out
    command = ["apply", "a", "-o", "b", "-r", "experts-int4", "--parity", "none", "--no-check", "--html", "r.html"]
    monkeypatch.setattr("sys.argv", ["rewriter", *command])
    assert main([*command, "--report", "r.json"]) == 0
    assert "Earlier rewritten by unstack (" in capsys.readouterr().out
    report = json.loads(Path("r.json").read_text())["provenance"]
    assert report["command"].startswith("rewriter apply a -o b") and report["versions"]["onnx-moe-rewriter"]
    page = Path("r.html").read_text()
    assert report["digest"] in page and "done before" in page


def test_reports_of_runs_at_other_times_are_equal():
    assert Provenance(date="2026-01-01T00:00:00+00:00") == Provenance(date="2026-01-02T00:00:00+00:00")
    assert Provenance(command="rewriter apply a") != Provenance(command="rewriter apply b")
