"""What stands around a run: pipes, closed streams, installations that nobody may write to, small file systems."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_models import GRANITE, linear

import rewriter


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
@pytest.mark.parametrize(
    "arguments",
    [
        ("apply", "linear.onnx", "-o", "out", "--imatrix", "pipe"),
        ("apply", "linear.onnx", "-o", "out", "--imatrix", "pipe.gguf"),
        ("check", "linear.onnx", "linear.onnx", "--inputs", "pipe"),
        ("check", "linear.onnx", "linear.onnx", "--tokens", "pipe"),
        ("calibrate", "linear.onnx", "-o", "seen", "--tokens", "pipe"),
    ],
)
def test_arrays_are_not_waited_for_in_a_pipe(run, arguments):
    linear()
    os.mkfifo(arguments[-1])
    code, _, err = run(*arguments)
    assert (code, err) == (2, f"error: '{arguments[-1]}' is not a regular file; write the arrays to one\n")
    assert not Path("out").exists() and not Path("seen").exists()


def command(*arguments, **options):
    """Runs the command line in a process of its own, at most for a minute."""
    shown = [sys.executable, "-m", "rewriter", *map(str, arguments)]
    return subprocess.run(shown, check=False, timeout=60, capture_output=True, text=True, **options)


def test_an_installation_that_cannot_be_written_to_and_no_home(tmp_path):
    package = tmp_path / "site" / "rewriter"
    shutil.copytree(Path(rewriter.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    folders = [package, *(path for path in package.rglob("*") if path.is_dir())]
    for folder in folders:
        (folder / "__pycache__").write_text("a file, so that not even root makes a folder of that name")
    for path in [*package.rglob("*"), *folders]:
        path.chmod(path.stat().st_mode & ~0o222)
    nowhere = {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null/cache", "PYTHONPATH": str(package.parent)}
    found = {name: value for name, value in os.environ.items() if name not in ("NUMBA_CACHE_DIR", "PYTHONHOME")}
    where = [sys.executable, "-c", "import rewriter; print(rewriter.__file__)"]
    said = subprocess.run(where, env=found | nowhere, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == str(package / "__init__.py")
    done = command("apply", linear(), "-o", "out", "-r", "rtn", "--no-check", env=found | nowhere)
    for folder in folders:
        folder.chmod(0o755)
    said = [line for line in done.stderr.splitlines() if "onnxruntime" not in line]
    assert done.returncode == 0 and all(line.startswith("... ") for line in said)  # a busy machine is told to wait
    assert Path("out", "linear.onnx").is_file()


def test_streams_may_be_closed():
    shell = f"exec {sys.executable} -m rewriter apply {{}} -o out -r unstack --no-check {{}}"
    assert subprocess.run(["bash", "-c", shell.format(GRANITE, ">&- 2>&-")], check=False).returncode == 0
    assert Path("out", GRANITE.name).is_file()
    assert subprocess.run(["bash", "-c", shell.format("missing.onnx", "2>&-")], check=False).returncode == 2


def test_a_file_that_would_grow_too_large_is_refused_before_anything_is_written(tmp_path):
    resource = pytest.importorskip("resource")
    weight = np.random.default_rng(0).standard_normal((1024, 512)).astype(np.float32)
    linear(weight=weight)
    done = command(
        *("apply", "linear.onnx", "-o", "out", "-r", "unstack", "--no-check"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)),
    )
    assert done.returncode == 2
    assert re.fullmatch("error: cannot write '.*/out': a file is larger than is allowed there, so .*\n", done.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["linear.onnx"]
