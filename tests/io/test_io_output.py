"""Output appears complete or not at all, and never over something else."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import onnx_ir as ir
import pytest
from io_models import external, files, linear

import rewriter
from rewriter import io
from rewriter.errors import RewriterWarning, UsageError
from rewriter.io import output


def test_an_existing_output_is_refused_or_its_files_replaced(tmp_path: Path) -> None:
    model, out = ir.from_proto(linear()), tmp_path / "out"
    out.mkdir()
    io.save(model, out)
    with pytest.raises(UsageError, match="--overwrite"):
        io.save(model, out)
    io.save(model, out / "other.onnx", overwrite=True)
    (out / "notes.txt").touch()
    assert list(files(out)) == ["model.onnx", "notes.txt", "other.onnx"]
    with pytest.raises(UsageError, match="is a file"):
        io.save(model, out / "notes.txt", overwrite=True)
    with pytest.raises(UsageError, match="part of the path is a file"):
        io.save(model, out / "model.onnx" / "below")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_appears_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, synced = tmp_path / "out", []
    monkeypatch.setattr(output, "sync", lambda path: synced.append((path.name, out.exists())))
    io.save(io.load(external(tmp_path / "in")), out, data_name="m.data")
    assert {("m.data", False), ("model.onnx", False)} < set(synced)
    assert synced[-1] == (tmp_path.name, True)


def test_the_input_is_never_written(tmp_path: Path) -> None:
    path = external(tmp_path / "a" / "in")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    before = files(path.parent)
    model = io.load(path)
    for out in (path.parent, tmp_path / "a", tmp_path / "link", tmp_path / "link" / "in"):
        with pytest.raises(UsageError, match="holds the input"):
            io.save(model, out, overwrite=True)
    io.save(model, path.parent / "below")
    shutil.rmtree(path.parent / "below")
    assert files(path.parent) == before


def test_an_output_of_its_own_name_lies_beside_its_input(tmp_path: Path) -> None:
    path = external(tmp_path / "onnx")
    before = files(path.parent)
    out = path.with_name("model_q4.onnx")
    result = rewriter.apply(path, "unstack")
    result.save(out, overwrite=True, data_name="model_q4.onnx_data")
    after = files(path.parent)
    assert {name: after[name] for name in before} == before
    assert sorted(after.keys() - before.keys()) == ["model_q4.onnx", "model_q4.onnx_data"]
    (data,) = before.keys() - {path.name}
    for place, names in ((path, {}), (path.with_stem(path.stem.upper()), {}), (out, {"data_name": data})):
        with pytest.raises(UsageError, match="holds the input"):
            result.save(place, overwrite=True, **names)
    with pytest.raises(UsageError, match="holds the input"):  # its other files would be copied over themselves
        rewriter.apply(path.parent, "unstack").save(
            io.Place.of(path.with_name("x.onnx"), overwrite=True, keep=[path.parent])
        )
    assert files(path.parent) == after


def test_places_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ir.from_proto(linear())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="free some space"):
        io.save(model, tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(UsageError, match="the name is too long"):
        io.save(model, tmp_path / ("a" * 300))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UsageError, match="permission denied"):
        io.save(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys, time
import numpy as np, onnx_ir as ir
from rewriter import io
model = io.load(sys.argv[1])
def wait():
    print("writing", flush=True)
    time.sleep(60)
tensor = ir.LazyTensor(wait, ir.DataType.FLOAT, ir.Shape([64, 64]), name="slow")
model.graph.register_initializer(ir.Value(name="slow", const_value=tensor))
io.save(model, sys.argv[2], max_shard_size=1 << 20)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="leftovers are kept where there are no locks")
def test_a_killed_run_leaves_no_output_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    path, out = external(tmp_path / "in"), tmp_path / "out"
    environment = os.environ | {"PYTHONPATH": str(Path(rewriter.__file__).parents[1])}
    command = [sys.executable, "-c", KILLED, str(path), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as run:
        assert run.stdout is not None and run.stdout.readline() == b"writing\n"
        partial = [p.name for p in tmp_path.iterdir() if p.name != "in"]
        assert partial == [f".out.partial-{run.pid}"]
        with pytest.raises(UsageError, match=rf"another run \(process {run.pid}\) is writing"):
            io.save(ir.from_proto(linear()), out)
        assert (tmp_path / partial[0]).exists() and not out.exists()
        run.send_signal(signal.SIGKILL)
    assert not out.exists() and (tmp_path / partial[0]).exists()
    with pytest.warns(RewriterWarning, match=rf"removed what a killed run left: '.*{partial[0]}' \(\d"):
        io.save(ir.from_proto(linear()), out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_folders_of_other_names_are_not_leftovers(tmp_path: Path) -> None:
    kept = [".out.partial", ".out.partial-x", ".outer.partial-1", "out.partial-1", ".out.partial-1-2-3", ".out.old-1"]
    for name in kept:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()
    (tmp_path / ".out.partial-7").touch()  # a file
    io.save(ir.from_proto(linear()), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*kept, ".out.partial-7", "out"])
