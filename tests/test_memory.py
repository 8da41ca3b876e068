"""How much memory is left is what limits and control groups say, and running out of it is one line with what helps."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from rewriter import memory
from rewriter.io import saving

GIB = 1 << 30
SMALL = Path(__file__).parent / "models" / "mobius" / "granitemoehybrid_static_unroll_f32.onnx"


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A process that is in a control group, and what files say of both."""
    monkeypatch.setattr(memory, "_PROCESS", tmp_path / "proc")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory, "_free", lambda: 64 * GIB)

    def write(**files):
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/").replace("_dot_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


def test_what_is_free_bounds_it(system):
    assert memory.available() == 64 * GIB


def test_a_group_of_the_second_version_bounds_it_and_its_cache_is_free(system):
    system(
        proc__cgroup="0::/a/b\n",
        groups__a__b__memory_dot_max="max\n",
        groups__a__b__memory_dot_current=f"{GIB}\n",
        groups__a__memory_dot_max=f"{4 * GIB}\n",
        groups__a__memory_dot_current=f"{3 * GIB}\n",
        groups__a__memory_dot_stat=f"anon {GIB}\ninactive_file {GIB // 2}\n",
    )
    assert memory.available() == GIB + GIB // 2
    assert "container" in memory.remedy()


def test_in_a_container_its_own_group_is_at_the_root(system):
    system(
        proc__cgroup="0::/docker/123\n",
        groups__memory_dot_max=f"{2 * GIB}\n",
        groups__memory_dot_current=f"{3 * GIB}\n",
    )
    assert memory.available() == 0


def test_a_group_of_the_first_version_bounds_it(system):
    system(
        proc__cgroup="5:cpu:/x\n4:memory:/x\n",
        groups__memory__x__memory_dot_limit_in_bytes=f"{2 * GIB}\n",
        groups__memory__x__memory_dot_usage_in_bytes=f"{GIB}\n",
        groups__memory__memory_dot_limit_in_bytes="9223372036854771712\n",
        groups__memory__memory_dot_usage_in_bytes=f"{GIB}\n",
    )
    assert memory.available() == GIB


def test_ulimit_bounds_it(system, monkeypatch):
    system(proc__status=f"VmSize:\t{GIB // 1024} kB\n")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (3 * GIB, resource.RLIM_INFINITY))
    assert memory.available() == 2 * GIB
    assert "ulimit -v" in memory.remedy()


@pytest.mark.parametrize(("left", "used"), [(None, 900), (3000, 900), (600, 200), (0, 1)])
def test_what_is_asked_for_is_kept_to_what_there_is(monkeypatch, left, used):
    monkeypatch.setattr(saving, "available", lambda: left)
    assert saving._kept_to(900) == used


def run_with(most: str, model: Path, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Applies the default rules where ``ulimit -v`` holds the process to what it takes now and ``most`` more."""
    code = (
        "import resource, sys; import rewriter.cli; from rewriter import memory;"
        f" most = memory._fields(memory._PROCESS / 'status')['VmSize'] + {most};"
        " resource.setrlimit(resource.RLIMIT_AS, (most, most));"
        f" sys.exit(rewriter.cli.main(['apply', {str(model)!r}, '-o', {str(out)!r}]))"
    )
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("most", ["(200 << 20)", "(400 << 20)", "(700 << 20)", "(900 << 20)"])
def test_too_few_addresses_to_compile_kernels_are_one_line_with_what_helps(tmp_path, most):
    done = run_with(most, SMALL, tmp_path / "out", NUMBA_CACHE_DIR=str(tmp_path / "kernels"))
    assert done.returncode == 2, done.stderr
    *libraries, last = done.stderr.splitlines()  # what a C++ library says on its own cannot be kept back
    assert last.startswith("error: out of memory; ulimit -v holds this process")
    assert not any("Traceback" in line for line in libraries)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_too_little_for_the_model_is_one_line_with_what_helps(tmp_path):
    weight = numpy_helper.from_array(np.ones((4096, 16384), np.float32), "w")
    x, y = (helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["t", d]) for n, d in (("x", 4096), ("y", 16384)))
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="model.data")
    done = run_with("(1 << 30) + (64 << 20)", tmp_path / "model.onnx", tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: out of memory; ulimit -v holds this process") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
