"""Overwriting replaces what a run writes, all of it or nothing, and leaves everything else in the directory alone."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from io_models import content, files, linear

from rewriter import io
from rewriter.errors import RewriterWarning, UsageError

OTHERS = {"notes.txt": b"notes", "other.onnx.data": b"?", "model.onnx.bak": b"b", "tokenizer.json": b"{}"}


def model(value: float, count: int = 3) -> ir.Model:
    """A model of ``count`` tensors of 4 KB."""
    proto = linear(extra=count)
    for tensor in proto.graph.initializer:
        tensor.raw_data = np.full(len(tensor.raw_data) // 4, value, np.float32).tobytes()
    return ir.from_proto(proto)


def populated(out: Path, value: float = 1, **options: Any) -> dict[str, bytes]:
    """Saves a model among other files and folders; returns what lies in the folder."""
    io.save(model(value), out, **options)
    for name, data in OTHERS.items():
        (out / name).write_bytes(data)
    (out / "sub").mkdir()
    (out / "sub" / "model.onnx").write_bytes(b"sub")
    (out / "other.onnx").write_bytes(linear().SerializeToString())
    return everything(out)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


SHARDS = {"one file": {}, "shards": {"max_shard_size": 8192}, "one data file": {"max_shard_size": 1 << 20}}


@pytest.mark.parametrize("new", SHARDS.values(), ids=SHARDS.keys())
@pytest.mark.parametrize("old", SHARDS.values(), ids=SHARDS.keys())
def test_overwriting_replaces_the_model_and_its_data_and_nothing_else(tmp_path: Path, old: Any, new: Any) -> None:
    before = populated(tmp_path / "out", **old)
    inode = (tmp_path / "out").stat().st_ino
    io.save(model(2), tmp_path / "out", overwrite=True, **new)
    io.save(model(2), tmp_path / "fresh", **new)
    own = {name for name in before if name.startswith("model.onnx") and name != "model.onnx.bak"}
    kept = {name: data for name, data in before.items() if name not in own}
    assert everything(tmp_path / "out") == kept | everything(tmp_path / "fresh")
    assert (tmp_path / "out").stat().st_ino == inode


def test_data_that_another_model_names_or_may_name_stays(tmp_path: Path) -> None:
    io.save(model(1), tmp_path / "out", max_shard_size=8192)
    first = "model.onnx-00001-of-00003.data"
    (tmp_path / "out" / "second.onnx").write_bytes((tmp_path / "out" / "model.onnx").read_bytes())
    io.save(model(2), tmp_path / "out", overwrite=True)
    assert first in files(tmp_path / "out")
    io.save(model(1), tmp_path / "out", max_shard_size=8192, overwrite=True)
    (tmp_path / "out" / "second.onnx").write_bytes(b"not to be read")
    io.save(model(2), tmp_path / "out", overwrite=True)
    assert first in files(tmp_path / "out")


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    io.save(model(1), tmp_path / "real")
    kept = everything(tmp_path / "real")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.onnx").symlink_to(tmp_path / "real" / "model.onnx")
    io.save(model(2), tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "model.onnx").is_symlink()
    assert everything(tmp_path / "real") == kept


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_a_folder_is_never_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / "out" / name).mkdir(parents=True)
    (tmp_path / "out" / name / "mine").touch()
    with pytest.raises(UsageError, match="is a directory, and a file of that name is to be written"):
        io.save(model(1), tmp_path / "out", max_shard_size=1 << 20, overwrite=True)
    assert list(everything(tmp_path / "out")) == [f"{name}/mine"]


MEANWHILE = {
    "the directory": (False, lambda out: io.save(model(9), out), "appeared while the model was written"),
    "a file in its place": (False, lambda out: out.write_text("mine"), "appeared while the model was written"),
    "a file of the name": (True, lambda out: (out / "new.onnx").write_text("mine"), "'.*new.onnx' appeared while"),
    "data of the name": (True, lambda out: (out / "new.onnx.data").write_text("mine"), "'.*new.onnx.data' appeared"),
    "changed": (True, lambda out: (out / "model.onnx").write_text("mine"), "'.*model.onnx' was changed while"),
    "replaced": (True, lambda out: io.save(model(9), out, overwrite=True), "'.*model.onnx' was changed while"),
}


@pytest.mark.parametrize(("exists", "do", "words"), MEANWHILE.values(), ids=MEANWHILE.keys())
def test_what_appears_while_a_run_writes_is_never_replaced(tmp_path: Path, exists: bool, do: Any, words: str) -> None:
    out = tmp_path / "out"
    name = "new.onnx" if "new" in words else "model.onnx"
    if exists:
        io.save(model(1), out)
    place = io.Place.of(out / name, overwrite=exists)
    do(out)
    found = everything(tmp_path)
    with pytest.raises(UsageError, match=words):
        io.save(model(2), place, max_shard_size=1 << 20)
    assert everything(tmp_path) == found


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("failing", [False, True], ids=["killed", "failing"])
@pytest.mark.parametrize("old", SHARDS.values(), ids=SHARDS.keys())
def test_a_kill_or_a_failure_at_any_step_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: Any, failing: bool
) -> None:
    step, done = 0, False
    while not done:
        step += 1
        out = tmp_path / str(step)
        before = populated(out, **old)
        done = fails_at(step, out, monkeypatch) if failing else killed_at(step, out)
        kept = {name: data for name, data in before.items() if not name.startswith("model.onnx")}
        left = everything(out)
        assert {name: left[name] for name in kept} == kept
        if "model.onnx" in left:
            assert values(out) in ({1.0}, {2.0})  # never parts of both
        else:
            assert any(name.startswith(".model.onnx.ready-") for name in left)
        if failing and not done:
            assert left == before
        elif not done and any("ready" in name for name in left):
            with pytest.warns(RewriterWarning, match=r"finished what a killed run had ready: '.*model.onnx'"):
                io.Place.of(out, overwrite=True)
            assert values(out) == {2.0}
            assert not [name for name in everything(out) if name.startswith(".")]
    assert step > 4 and values(out) == {2.0}


def values(out: Path) -> set[float]:
    return {float(v) for _, data in content(io.load(out / "model.onnx")) for v in np.frombuffer(data, np.float32)}


def killed_at(step: int, out: Path) -> bool:
    """Overwrites in another process that is killed at its n-th rename; returns whether it came to its end."""
    pid = os.fork()
    if not pid:
        count = 0

        def audit(event: str, _: Any) -> None:
            nonlocal count
            if event in ("os.rename", "os.remove", "os.rmdir"):
                count += 1
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(audit)
            io.save(model(2), out, max_shard_size=8192, overwrite=True, max_workers=1)
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code == 0


def fails_at(step: int, out: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Overwrites, and the n-th move fails; returns whether it came to its end."""
    count = 0

    def failing(real: Any) -> Any:
        def call(self: Path, target: Path) -> Path:
            nonlocal count
            count += 1
            if count == step:
                raise PermissionError(13, "Permission denied")
            return real(self, target)  # type: ignore[no-any-return]

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing(Path.rename))
        patch.setattr(Path, "replace", failing(Path.replace))
        try:
            io.save(model(2), out, max_shard_size=8192, overwrite=True)
        except UsageError:
            return False
    return True


def test_a_replacement_that_cannot_be_finished_is_named_and_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    populated(out, max_shard_size=8192)
    for step in range(1, 99):
        killed_at(step, out)
        if "model.onnx" not in files_in(out):
            break
    (out / "model.onnx").write_text("mine")
    found = everything(out)
    with pytest.raises(UsageError, match=r"left a complete model in '.*ready.*' that cannot take its place"):
        io.save(model(3), out, overwrite=True)
    assert everything(out) == found


def files_in(out: Path) -> set[str]:
    return {path.name for path in out.iterdir()}


def test_a_mount_point_or_a_folder_made_before_is_written_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir(mode=0o700)
    inode = out.stat().st_ino
    monkeypatch.chdir(out)
    io.save(model(1), Path(), max_shard_size=8192)
    assert out.stat().st_ino == inode
    assert values(out) == {1.0}
