"""Kills runs, runs two at once and fills the disk, and counts what was lost: ``python benchmarks/kills.py``.

Each trial overwrites a model of several data files in a folder that holds other things. It loses nothing where the
folder afterwards holds the other things as they were, and under the model's name the old model, the new one, or, after
a kill, none while the next run puts the new one in place. The input must be what it was. A run that is killed as it
writes a new model is then gone on with by ``--resume``: the same bytes, and no weight quantized twice but those that
were in flight; these runs are killed at a random moment while they write. Each run is the command line
in a process of its own, forked from this one, so that no time goes into imports. It is no part of the tests, which kill
a run at each of its steps instead.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from rewriter import cli, io
from rewriter.graph.contents import stored_tensors
from rewriter.io.replacing import JOURNAL
from rewriter.quantize.job import QuantizationJob
from rewriter.quantize.types import QuantizedWeight

RESUMED = ("-r", "k-quant", "--parity", "none", "--no-check", "-q", "--max-shard-size", "2MB", "--resume")
OPTIONS = ("-r", "rtn", "--parity", "none", "--no-check", "-q", "--max-shard-size", "100kB", "--overwrite")

WEIGHTS = 40
"""Of the model of which runs are gone on with."""


def main() -> int:
    """Runs all trials; returns 1 where something was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--terms", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--full", type=int, default=20)
    parser.add_argument("--resumes", type=int, default=30)
    given = parser.parse_args()
    generator = random.Random(0)
    with tempfile.TemporaryDirectory() as directory:
        trials = Trials(Path(directory))
        print(f"one whole run: {trials.seconds:.1f} s")
        for _ in range(given.kills):
            trials.signalled(signal.SIGKILL, generator.uniform(0, 1.1) * trials.seconds)
        for index in range(given.terms):
            number = (signal.SIGTERM, signal.SIGHUP)[index % 2]
            trials.signalled(number, generator.uniform(0, 1.1) * trials.seconds)
        for _ in range(given.pairs):
            trials.pair(generator.uniform(0, trials.seconds))
        for _ in range(given.full):
            trials.full(generator.randrange(trials.largest))
        resumes = Resumes(Path(directory) / "resumes")
        for _ in range(given.resumes):
            trials.seen[resumes.killed(generator.uniform(0, WEIGHTS))] += 1
        print(f"{given.kills} kills, {given.terms} SIGTERM and SIGHUP, {given.pairs} pairs, {given.full} without room,")
        print(f"{given.resumes} resumed; of {WEIGHTS} weights were noted {sorted(resumes.noted)},")
        print(f"and quantized twice {sorted(resumes.twice)}:")
        for what, count in sorted(trials.seen.items()):
            print(f"{count:4}  {what}")
        return int(any("LOST" in what for what in trials.seen))


class Run:
    """The command ``rewriter apply`` in a process of its own."""

    def __init__(
        self, model: Path, out: Path, *options: str, largest_file: int | None = None, counted: Path | None = None
    ) -> None:
        reads, writes = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            code = 99
            try:
                os.dup2(writes, 2)
                if largest_file is not None:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
                if counted is not None:
                    count_weights(counted)
                code = cli.main(["apply", str(model), "-o", str(out), *options])
            finally:
                os._exit(code)
        os.close(writes)
        self._said = reads

    def is_alive(self) -> bool:
        """Whether it runs, or was not waited for."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"

    def wait(self) -> tuple[int, str]:
        """Returns the exit code and what was said on stderr."""
        with os.fdopen(self._said, encoding="utf-8") as stream:
            said = stream.read()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), said


def count_weights(file: Path) -> None:
    """Notes each weight that this process begins to quantize by a byte in a file."""
    right = QuantizationJob.quantize

    def counting(job: QuantizationJob, *weight: Any) -> QuantizedWeight:
        with file.open("ab", buffering=0) as stream:
            stream.write(b".")
        return right(job, *weight)

    QuantizationJob.quantize = counting


def begun(file: Path) -> int:
    """Returns how many weights are noted in a file."""
    return file.stat().st_size if file.exists() else 0


class Resumes:
    """A model of which a run writes a new one, and what became of those that were killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = folder / "in" / "model.onnx"
        self.model.parent.mkdir(parents=True)
        write_model(self.model, 0, width=1024, count=WEIGHTS)
        self.noted: list[int] = []
        self.twice: list[int] = []
        assert Run(self.model, folder / "whole", *RESUMED).wait() == (0, "")
        self.whole = read(folder / "whole")

    def killed(self, weights: float) -> str:
        """Kills a run after so many weights, about, and goes on with it; says what became of it."""
        place = self.folder / "place"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        run = Run(self.model, place / "out", *RESUMED, counted=place / "first")
        while begun(place / "first") < weights // 1 and run.is_alive():
            time.sleep(0.0005)
        time.sleep(weights % 1 * 0.05)
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        left = next((path for path in place.iterdir() if path.name.startswith(".")), None)
        journal = b"" if left is None or not (left / JOURNAL).exists() else (left / JOURNAL).read_bytes()
        noted = max(0, journal.count(b"\n") - 1)
        code, said = Run(self.model, place / "out", *RESUMED, counted=place / "second").wait()
        made = [begun(place / name) for name in ("first", "second")]
        if (place / "out").exists() and not made[1]:
            return "SIGKILL, then --resume: the run had ended"
        right = code == 0 and read(place / "out") == self.whole and made[1] == WEIGHTS - noted
        if not right:
            return f"SIGKILL, then --resume: LOST ({code}, {said}, {made}, {noted})"
        self.noted.append(noted)
        self.twice.append(sum(made) - WEIGHTS)
        return "SIGKILL, then --resume: the same bytes, nothing that was noted was quantized again"


class Trials:
    """A model, a folder of other things, and what became of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = folder / "in" / "model.onnx"
        self.model.parent.mkdir()
        write_model(self.model, 0)
        self.input = read(self.model.parent)
        self.seen: Counter[str] = Counter()
        write_model(folder / "old.onnx", 1)
        # In this process, so that those which are forked from it have all imported and compiled.
        assert not cli.main(["apply", str(folder / "old.onnx"), "-o", str(folder / "old" / "model.onnx"), *OPTIONS])
        self.old = read(folder / "old")
        started = time.monotonic()
        assert Run(self.model, folder / "new", *OPTIONS).wait() == (0, "")
        self.seconds = time.monotonic() - started
        self.new = read(folder / "new")
        self.largest = max(map(len, self.new.values()))

    def prepared(self) -> Path:
        """Returns a folder with the old model and other things."""
        out = self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(self.folder / "old", out)
        (out / "notes.txt").write_text("mine")
        (out / "sub").mkdir()
        (out / "sub" / "other.onnx").write_text("mine")
        return out

    def signalled(self, number: int, after: float) -> None:
        """Sends a signal to a run."""
        out = self.prepared()
        run = Run(self.model, out, *OPTIONS)
        time.sleep(after)
        os.kill(run.pid, number)
        code, _ = run.wait()
        name = signal.Signals(number).name
        left = any(path.name.startswith(".") for path in out.iterdir())
        assert not left or number == signal.SIGKILL, "something was left behind"
        ended = "ended first" if not code else "in time"
        self.judge(f"{name}, {ended}: ", out, after_kill=number == signal.SIGKILL)

    def pair(self, between: float) -> None:
        """Starts two runs into one place that does not exist."""
        out = self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        runs = [Run(self.model, out, *OPTIONS[:-1])]
        time.sleep(between)
        runs.append(Run(self.model, out, *OPTIONS[:-1]))
        codes = sorted(run.wait()[0] for run in runs)
        right = codes == [0, 2] and read(out) == self.new
        self.seen["two at once: " + ("one wrote it, one was refused" if right else f"LOST ({codes})")] += 1

    def full(self, size: int) -> None:
        """Runs where no file may be larger than ``size``, as on a disk that is full there."""
        out = self.prepared()

        code, said = Run(self.model, out, *OPTIONS, largest_file=size).wait()
        assert code == 2 and said.count("\n") == 1, said
        self.judge("no room: ", out, after_kill=False)

    def judge(self, what: str, out: Path, *, after_kill: bool) -> None:
        """Counts what a trial left, and lets the next run go on where it was killed."""
        found = read(out)
        kept = found.pop("notes.txt", None) == found.pop("sub/other.onnx", None) == b"mine"
        state = self.state(found)
        if after_kill and state not in ("the old model", "the new model"):
            io.Place.of(out, overwrite=True)
            state = f"none, then {self.state(read(out))}"
        same = kept and read(self.model.parent) == self.input
        self.seen[what + (state if same and not state.endswith("LOST") else f"LOST ({state})")] += 1

    def state(self, found: dict[str, bytes]) -> str:
        visible = {name: data for name, data in found.items() if not name.startswith(".") and "." in name}
        model = {name: data for name, data in visible.items() if name.startswith("model.onnx")}
        for name, wanted in (("the old model", self.old), ("the new model", self.new)):
            if model.get("model.onnx") == wanted["model.onnx"] and all(model.get(k) == v for k, v in wanted.items()):
                return name
        return "none" if "model.onnx" not in model else "LOST"


def read(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_model(path: Path, seed: int, width: int = 256, count: int = 12) -> None:
    """Writes a chain of linears, each ``width`` square."""
    draw = np.random.default_rng(seed)
    weights = [draw.standard_normal((width, width)).astype(np.float32) for _ in range(count)]
    graph = helper.make_graph(
        [helper.make_node("MatMul", [f"v{i}", f"w{i}"], [f"v{i + 1}"], f"m{i}") for i in range(count)],
        "g",
        [helper.make_tensor_value_info("v0", TensorProto.FLOAT, ["n", width])],
        [helper.make_tensor_value_info(f"v{count}", TensorProto.FLOAT, ["n", width])],
        [numpy_helper.from_array(weight, f"w{i}") for i, weight in enumerate(weights)],
    )
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    path.write_bytes(model.SerializeToString())
    assert len(list(stored_tensors(io.load(path)))) == count


if __name__ == "__main__":
    raise SystemExit(main())
