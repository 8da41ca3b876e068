"""The command line as a whole: help, completion, terminals."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import sys
import time
import types

import pytest
from cli_models import GRANITE, linear

from rewriter import api
from rewriter.cli import options, tables
from rewriter.cli.console import byte_bar, console, show, working
from rewriter.report import Decline, Left, PlanLine, Report, UsedRuleSet
from rewriter.text import nbytes, shrink


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


def test_help_has_room_for_its_texts_and_keeps_their_brackets(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = run("apply", "--help")[1]
    assert "quantization.default.bits=8." in out and "…" not in out
    options = [line for line in out.splitlines() if re.match(r"│ (.  )?--\w", line)]
    assert len(options) > 20 and len(re.findall(r"^╭─ \w", out, re.MULTILINE)) == 5
    assert all(line.index(re.split(r" {2,}", line.rstrip(" │"))[-1]) < 45 for line in options)
    for command in ("apply", "calibrate", "check", "compare"):
        assert "ids [sequences, length]" in " ".join(re.sub("[│]", " ", run(command, "--help")[1]).split()), command


def test_the_default_rule_set_is_that_of_the_api():
    assert options.DEFAULT_RULES == api.DEFAULT_RULES


def test_what_a_run_rarely_needs_is_loaded_when_it_does(tmp_path):
    code = f"""if True:
        import sys
        from rewriter.cli import main
        assert main(["apply", {str(GRANITE)!r}, "-o", {str(tmp_path / "out")!r}, "--no-check"]) == 0
        assert not {{"sympy.core", "onnx.reference.op_run"}} & sys.modules.keys()
        import onnx_ir as ir
        assert str(ir.SymbolicDim("a") * 2 + 1) == "2*a + 1"
        from sympy import Symbol
        from sympy.core.symbol import Symbol as same
        assert Symbol is same and sys.modules["sympy"].__version__
        from onnx.reference import ReferenceEvaluator
        from onnx.reference.ops import load_op
        assert ReferenceEvaluator.__name__ and load_op("", "Add")
    """
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


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
        shown = b"".join(_read(host)).decode()
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "writing out" in shown
    assert "writing" not in out


def _read(terminal):
    """What is shown until the last that shows anything there ends; a terminal holds but a few kilobytes at a time."""
    with open(terminal, "rb", buffering=0) as stream, contextlib.suppress(OSError):  # noqa: PTH123 -- no path
        while shown := stream.read(1 << 16):
            yield shown


def test_a_reader_that_leaves_early_is_no_failure():
    command = f"{sys.executable} -m rewriter rules | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_long_tables_are_cut(capsys):
    declines = tuple(Decline("r", "p", "n", f"reason {i}", "") for i in range(44))
    show(console(), tables.declined(Report("s", "t", declines=declines).refusals, "; see r.json"))
    out = capsys.readouterr().out
    assert "and 34 more; see r.json" in out
    assert len(out.splitlines()) < 26


@pytest.mark.parametrize("width", ["30", "60", "80"])
def test_no_number_is_cut_on_a_narrow_terminal(run, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", width)
    out = run("apply", GRANITE, "-o", "out")[1]
    for role, after in (("embedding", "20.5 kB"), ("shared_expert.gate_up", "10.2 kB"), ("attention.o", "5.12 kB")):
        assert re.search(rf"^{role} .* {after} .*\d\.\d\d% *$", out, re.MULTILINE), out
    assert re.search(r"Against the original[\s\S]* \d+\.\d%", out)


def test_output_that_cannot_be_printed_is_one_line():
    for where in (">&-", "> /dev/full"):
        done = subprocess.run(
            ["bash", "-c", f"{sys.executable} -m rewriter rules {where}"], capture_output=True, text=True, check=False
        )
        assert "internal" not in done.stderr
        assert done.returncode == (0 if where == ">&-" else 2)


@pytest.mark.parametrize(
    ("text", "count"),
    [("1048576", 1 << 20), ("512MiB", 512 << 20), ("2GB", 2 * 10**9), ("1.5g", 15 * 10**8), ("4 KiB", 4096)],
)
def test_sizes_are_read(text, count):
    assert options.size(text) == count


def test_sizes_are_written():
    sizes = (0, 999, 1000, 9_994, 9_996, 99_960, 999_400, 999_600, 51_000_000_000, 2e12)
    shown = ["0 B", "999 B", "1.00 kB", "9.99 kB", "10.0 kB", "100 kB", "999 kB", "1.00 MB", "51.0 GB", "2.00 TB"]
    assert [nbytes(size) for size in sizes] == shown
    assert shrink(51_000_000_000, 13_000_000_000) == "51.0 GB -> 13.0 GB (3.9x smaller)"
    assert shrink(10, 10) == "10 B -> 10 B"
    assert shrink(666_944, 666_940) == "667 kB -> 667 kB"
    assert shrink(10, 20) == "10 B -> 20 B (2.0x larger)"


def test_targets_and_names_are_completed():
    assert options.complete_targets("cu") == ["cuda", "cuda:sm80", "cuda:sm90"]
    assert "webgpu@1.32" in options.complete_targets("webgpu@")
    context = types.SimpleNamespace(params={"model": GRANITE})
    assert "lm_head.weight_t" in options.complete_names(context, "lm_")
    assert "expert.down" in options.complete_names(context, "expert.")
    assert options.complete_names(types.SimpleNamespace(params={}), "x") == []


def test_where_there_is_no_terminal_a_line_now_and_then_says_what_is_being_done(monkeypatch, capsys):
    monkeypatch.setattr("rewriter.cli.console.SECONDS", 0.001)

    def said(line):
        found = ""
        while line not in found:  # no end where it never comes
            found += capsys.readouterr().err
        assert set(found.splitlines()) <= {"... reading", "... matching", "... writing o", line}

    with working("reading", quiet=False) as tell:
        said("... reading")
        tell("matching")
        said("... matching")
    with byte_bar("writing o", quiet=False) as told:
        told(2_000_000, 8_000_000)
        said("... writing o, 2.00 MB of 8.00 MB")
    with working("reading", quiet=True):
        time.sleep(0.01)
    assert capsys.readouterr().err.strip() in ("", "... writing o, 2.00 MB of 8.00 MB")


def test_lines_of_a_plan_that_decide_nothing_come_last_and_no_other_is_hidden():
    lines = [PlanLine("override", f"dead {i}", {"bits": 8}, 2, 2) for i in range(3)]
    lines += [PlanLine("override", f"live {i}", {"bits": 4}, 2, i % 2) for i in range(12)]
    shown = tables.plan(UsedRuleSet("x", plan=tuple(lines)))
    cells = [str(cell).split(":")[0] for cell in shown.table(100)[0].columns[1].cells]
    assert cells == [*(f"override live {i}" for i in range(12)), "and 3 more that decide nothing"]
    few = tables.plan(UsedRuleSet("x", plan=tuple(lines[:4])))
    cells = [str(cell).split(":")[0] for cell in few.table(100)[0].columns[1].cells]
    assert cells == ["override live 0", *(f"override dead {i}" for i in range(3))]


def test_several_declines_say_that_their_bytes_are_of_all_together():
    weight = Left("w", "", 4096, (), rule="r", reason="why")
    declines = [Decline("r", "p", f"n{i}", "why", "c") for i in range(2)]
    for some, words in ((declines, "; 4.10 kB stay float together"), (declines[:1], "; 4.10 kB stay float")):
        (refusal,) = Report("s", "cpu", declines=tuple(some), left=(weight,)).refusals
        sheet = tables.declined([refusal], "")
        assert str(sheet.table(100)[0].columns[1]._cells[0]).endswith(words)
