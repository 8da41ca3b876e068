"""Signals, streams that are closed and input that changes meanwhile: one line, and nothing is left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli_models import linear, tree

import rewriter
from rewriter.tensors.mapped import MappedFile

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are another matter there")

ENDINGS = {
    "SIGTERM": (signal.SIGTERM, 143, "error: ended by SIGTERM\n"),
    "SIGHUP": (getattr(signal, "SIGHUP", 1), 129, "error: ended by SIGHUP\n"),
    "SIGINT": (signal.SIGINT, 130, "error: interrupted\n"),
}


@pytest.fixture(autouse=True)
def heard():
    """Has signals heard also where the tests run in the background or under nohup, born ignoring them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGHUP, before[1])


@pytest.fixture
def sent(monkeypatch):
    """Returns a function that has a signal sent to this process, twice, when the first bytes are written."""

    def send(number):
        def kill(*_):
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)

        monkeypatch.setattr("rewriter.io.streaming.Meter.add", kill)

    return send


@pytest.mark.parametrize(("number", "code", "line"), ENDINGS.values(), ids=ENDINGS.keys())
def test_a_signal_ends_a_run_as_ctrl_c_does(run, sent, tmp_path, number, code, line):
    sent(number)
    before = signal.getsignal(number)
    assert run("apply", linear(), "-o", "deep/out", "--max-shard-size", "1MiB") == (code, "", line)
    assert [path.name for path in tmp_path.iterdir()] == ["linear.onnx"]
    assert signal.getsignal(number) == before


def test_a_signal_that_is_ignored_stays_ignored(run, sent, tmp_path):
    sent(signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run("apply", linear(), "-o", "out", "-q")[0] == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_data_that_are_replaced_while_they_are_read_are_one_line(run, tmp_path, monkeypatch):
    model, real = linear(external="w.data", size=8192), MappedFile.map

    def replaced(self):
        shutil.copy("w.data", "new")
        Path("new").replace("w.data")
        return real(self)

    monkeypatch.setattr(MappedFile, "map", replaced)
    code, _, err = run("apply", model, "-o", "out")
    assert code == 2
    assert "w.data' was changed while it was read; run again when nothing writes it" in err
    assert sorted(tree(tmp_path)) == ["linear.onnx", "w.data"]


SHORTENED = """
import os, sys
from rewriter import __main__
from rewriter.tensors.mapped import MappedFile
def shortened(self, real=MappedFile.map):
    found = real(self)
    os.truncate("w.data", 5)
    return found
MappedFile.map = shortened
sys.exit(__main__.main())
"""


def process(line, *arguments):
    environment = os.environ | {"PYTHONPATH": str(Path(rewriter.__file__).parents[1])}
    command = ["sh", "-c", line, sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_data_that_become_shorter_while_they_are_read_are_one_line(tmp_path):
    model = linear(external="w.data", size=8192)
    found = process('"$0" -c "$@"', SHORTENED, "apply", model, "-o", "out")
    assert (found.returncode, found.stderr.count("\n")) == (2, 1)
    assert found.stderr.startswith("error: a data file became shorter while it was read")
    assert sorted(tree(tmp_path)) == ["linear.onnx", "w.data"]


def test_all_streams_may_be_closed(tmp_path):
    model = linear()
    found = process('"$0" -m rewriter "$@" <&- >&- 2>&-', "apply", model, "-o", "out", "--no-check", "-r", "rtn")
    assert (found.returncode, found.stderr) == (0, "")
    assert list(tree(tmp_path / "out")) == ["linear.onnx"]


SLOW = """
import os, signal, sys
from rewriter import __main__
class Slow:
    def find_spec(self, name, *rest):
        if name == "rewriter.cli":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Slow())
sys.exit(__main__.main())
"""


def test_ctrl_c_before_the_commands_are_loaded_is_quiet():
    found = process('"$0" -c "$@"', SLOW)
    assert (found.stderr, found.returncode) == ("error: interrupted\n", 130)


@pytest.mark.parametrize("arguments", [["--help"], ["apply", "--help"], ["rules"]])
def test_a_reader_that_has_enough_is_no_error(arguments):
    """As behind ``| head``: the pipe is closed before anything is written to it."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "rewriter", *arguments]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
