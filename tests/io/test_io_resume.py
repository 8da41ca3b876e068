"""A run that was killed is gone on with: the same bytes, and no weight is quantized twice but those in flight."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import rewriter
from rewriter.errors import RewriterWarning, UsageError
from rewriter.io.replacing import JOURNAL
from rewriter.quantize import rtn
from rewriter.quantize.job import QuantizationJob

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="leftovers are kept where there are no locks")

MODEL = Path(__file__).parents[1] / "models" / "mobius" / "granitemoehybrid_static_unroll_f32.onnx"
RULES: dict[str, Any] = {"rules": "moe-int4", "overrides": {"parity.local": "none"}}
SHARDS = 30_000
WRITES, WEIGHTS = 14, 26
"""What is computed for data files: four of the writes are stacks of four experts."""

KILLED = """
import json, os, signal, sys
from importlib import import_module
import rewriter
from rewriter.io import saving

def killed_at(module, holder, name, calls):
    owner = getattr(import_module(module), holder) if holder else import_module(module)
    right = getattr(owner, name)
    def wrong(*arguments, **options):
        nonlocal calls
        calls -= 1
        if not calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return right(*arguments, **options)
    setattr(owner, name, wrong)

model, folder, rules, shards, moments = sys.argv[1:]
result = rewriter.apply(model, **json.loads(rules))
saving.processors = lambda: 1
for index, moment in enumerate(json.loads(moments)):
    if not os.fork():
        killed_at(*moment)
        result.save(os.path.join(folder, str(index), "out"), max_shard_size=int(shards))
        os._exit(1)
    assert os.WIFSIGNALED(os.wait()[1]), moment
"""

MOMENTS = {
    "before a weight is read": (("rewriter.io.writes", "QuantizeTask", "__call__", 1), 0, 0),
    "between a weight's codes and its scales": (("rewriter.io.writes", "Digest", "add", 6), 0, 2),
    "between a weight's bytes and its line": (("rewriter.io.journal", "Journal", "add", 6), 5, 5),
    "before the model file": (("rewriter.io.inline", "Message", "write", 1), WRITES, WRITES),
    "before it is read back": (("rewriter.io.saving", "", "verify", 1), WRITES, WRITES),
}
"""When a run is killed, and how many writes its journal then holds: at least, and at most."""
MIDDLE = list(MOMENTS).index("between a weight's bytes and its line")


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def result() -> Any:
    return rewriter.apply(MODEL, **RULES)


@pytest.fixture(scope="module")
def whole(result: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], Any]:
    """What a run writes that is not killed, and its report."""
    out = tmp_path_factory.mktemp("whole") / "out"
    result.save(out, max_shard_size=SHARDS)
    return everything(out), result.report.weights


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each of the moments, with what the run left there."""
    folder = tmp_path_factory.mktemp("killed")
    for index in range(len(MOMENTS)):
        (folder / str(index)).mkdir()
    moments = json.dumps([moment for moment, *_ in MOMENTS.values()])
    command = [sys.executable, "-c", KILLED, str(MODEL), str(folder), json.dumps(RULES), str(SHARDS), moments]
    environment = os.environ | {"PYTHONPATH": str(Path(rewriter.__file__).parents[1])}
    subprocess.run(command, check=True, env=environment)
    return folder


@pytest.fixture
def left(killed: Path, tmp_path: Path) -> Path:
    """What a run left that was killed in the middle; the place is ``out`` beside it."""
    shutil.copytree(killed / str(MIDDLE), tmp_path, dirs_exist_ok=True)
    return next(tmp_path.iterdir())


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The weights that are quantized from now on."""
    seen: list[str] = []
    right = QuantizationJob.quantize

    def counting(job: QuantizationJob, *weight: Any) -> Any:
        seen.append(job.context.weight)
        return right(job, *weight)

    monkeypatch.setattr(QuantizationJob, "quantize", counting)
    return seen


def warned(message: str) -> Any:
    """Expects a warning, or none."""
    return pytest.warns(RewriterWarning, match=message) if message else contextlib.nullcontext()


def noted(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()[1:]]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_is_gone_on_with(
    moment: str, killed: Path, whole: Any, quantized: list[str], tmp_path: Path
) -> None:
    _, least, most = MOMENTS[moment]
    place = shutil.copytree(killed / str(list(MOMENTS).index(moment)), tmp_path / "place")
    entries = noted(next(place.iterdir()))
    assert least <= len(entries) <= most
    there = sum(len(entry["measured"]) for entry in entries)
    with warned(f"killed run ended: {there} of {WEIGHTS} weights" if entries else ""):
        result = rewriter.apply(MODEL, **RULES)
        result.save(place / "out", resume=True, max_shard_size=SHARDS)
    assert len(quantized) == len(set(quantized)) == WEIGHTS - there
    assert (everything(place / "out"), result.report.weights) == whole
    assert [path.name for path in place.iterdir()] == ["out"]


def _cut(left: Path) -> None:
    data = (left / JOURNAL).read_bytes()
    (left / JOURNAL).write_bytes(data[:-9])


def _early(left: Path) -> None:
    """The bytes of the last write that is noted never reached the disk."""
    _, file, offset, length = noted(left)[-1]["write"][0]
    with (left / file).open("r+b") as stream:
        stream.seek(offset)
        stream.write(bytes(length))


def _garbage(left: Path) -> None:
    lines = (left / JOURNAL).read_bytes().splitlines(keepends=True)
    lines[2] = b"\0" * (len(lines[2]) - 1) + b"\n"
    (left / JOURNAL).write_bytes(b"".join(lines))


def _elsewhere(left: Path) -> None:
    """The digest of one weight stands in the line of another place."""
    lines = (left / JOURNAL).read_text().splitlines(keepends=True)
    entry = json.loads(lines[-1])
    entry["write"][0][2] += 1
    (left / JOURNAL).write_text("".join([*lines[:-1], f"{json.dumps(entry)}\n"]))


@pytest.mark.parametrize("wrong", [_cut, _early, _garbage, _elsewhere])
def test_a_line_that_is_not_true_is_not_believed(
    wrong: Callable[[Path], None], left: Path, result: Any, whole: Any, quantized: list[str]
) -> None:
    lost = noted(left)[1 if wrong is _garbage else -1]["measured"]
    there = sum(len(entry["measured"]) for entry in noted(left))
    wrong(left)
    with pytest.warns(RewriterWarning, match=rf"killed run ended: \d+ of {WEIGHTS} weights"):
        result.save(left.parent / "out", resume=True, max_shard_size=SHARDS)
    assert len(quantized) == WEIGHTS - there + len(lost)
    assert (everything(left.parent / "out"), result.report.weights) == whole


def _changed(tmp_path: Path) -> dict[str, Any]:
    """The same model with other weights in its place."""
    proto = onnx.load(MODEL)
    tensor = next(t for t in proto.graph.initializer if "o_proj" in t.name)
    values = np.frombuffer(tensor.raw_data, np.float32) * 2
    tensor.raw_data = values.tobytes()
    (tmp_path / "changed.onnx").write_bytes(proto.SerializeToString())
    return {"model": tmp_path / "changed.onnx"}


@pytest.mark.parametrize(
    ("what", "other"),
    [
        ("model", _changed),
        ("rule set", {"rules": "moe-int8"}),
        ("rule set", {"overrides": {"parity.local": "none", "quantization.default.block_size": 16}}),
        ("target", {"target": "cpu@1.30"}),
        ("imatrix", {"imatrix": {"lm_head.weight_t": np.ones(64, np.float32)}}),
        ("plan of the output", {"shards": 40_000}),
    ],
)
def test_a_run_of_another_kind_is_refused_and_loses_nothing(what: str, other: Any, left: Path, tmp_path: Path) -> None:
    given = {"model": MODEL, "shards": SHARDS, **RULES, **(other(tmp_path) if callable(other) else other)}
    shards = given.pop("shards")
    before = everything(left)
    with pytest.raises(UsageError, match=rf"'{left}' was left by a run with another {what} \(.*leave out --resume"):
        rewriter.apply(**given).save(left.parent / "out", resume=True, max_shard_size=shards)
    assert everything(left) == before


def test_a_run_of_another_version_is_refused(left: Path, result: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewriter.io.saving.code", lambda: "0.0.1")
    with pytest.raises(UsageError, match=r"with another version \(.* now 0\.0\.1\)"):
        result.save(left.parent / "out", resume=True, max_shard_size=SHARDS)


def test_without_resume_what_is_left_is_removed_and_resume_is_named(left: Path, result: Any, whole: Any) -> None:
    with pytest.warns(RewriterWarning, match=r"removed what a killed run left: .*; --resume, in Python resume=True"):
        result.save(left.parent / "out", max_shard_size=SHARDS)
    assert everything(left.parent / "out") == whole[0]


def test_what_cannot_be_told_from_another_run_is_not_resumed(tmp_path: Path) -> None:
    for given in ({"model": rewriter.io.load(MODEL)}, {"model": MODEL, "quantizer": rtn.quantize}):
        with pytest.raises(UsageError, match="leave out resume"):
            rewriter.apply(**RULES, **given).save(tmp_path / "out", resume=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("resume", [True, False])
def test_an_interrupted_run_keeps_what_is_written_where_it_may_be_resumed(
    resume: bool, result: Any, whole: Any, tmp_path: Path
) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    options = {"resume": resume, "max_shard_size": SHARDS}
    with pytest.raises(KeyboardInterrupt), warned("is kept" if resume else ""):
        result.save(tmp_path / "out", progress=interrupt, **options)
    assert len(list(tmp_path.iterdir())) == resume
    with warned("went on where a killed run ended" if resume else ""):
        result.save(tmp_path / "out", **options)
    assert everything(tmp_path / "out") == whole[0]


def test_resuming_into_a_folder_of_other_things(left: Path, result: Any, whole: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    left.rename(out / f".{MODEL.name}.partial-7")
    with pytest.warns(RewriterWarning, match="went on where a killed run ended"):
        result.save(out, resume=True, overwrite=True, max_shard_size=SHARDS)
    assert everything(out) == {"notes.txt": b"mine", **whole[0]}
