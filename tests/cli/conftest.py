"""What the tests of the command line share."""

from __future__ import annotations

import pytest
from cli_models import GRANITE

from rewriter.cli import main


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
