"""Where the time of a run goes: wall and processor seconds of each stage, on two processors and on all.

    python benchmarks/stages.py [--gigabytes 1.5] [--rules moe-int4] [--layers 30] [--experts 128]

Makes the model of benchmarks/streaming.py and rewrites it in a process of its own for each number of processors. The
stages: import; load; match (facts, roles, rules, commits, validation, the report); prove, the quantizing of proofs
included; quantize: weights are read, quantized, packed, read back and measured, the wall time being that during which
at least one was in work; write, the rest of saving.
Proofs run models in one more process, whose processor seconds are a line of their own. Last, what loading the model
by onnx-ir and writing it again takes, and the sum of all stages to that.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STAGES = ("import", "load", "match", "prove", "quantize", "write")


class Clock:
    """Wall and processor seconds of a stage, which several threads may be in at once."""

    def __init__(self) -> None:
        self.wall = self.processor = 0.0
        self._inside, self._since, self._lock = 0, 0.0, threading.Lock()

    @contextmanager
    def running(self, processor: Callable[[], float] = time.thread_time) -> Iterator[None]:
        with self._lock:
            self._since = self._since if self._inside else time.perf_counter()
            self._inside += 1
        start = processor()
        try:
            yield
        finally:
            used = processor() - start
            with self._lock:
                self.processor += used
                self._inside -= 1
                self.wall += 0.0 if self._inside else time.perf_counter() - self._since

    def without(self, *others: Clock) -> tuple[float, float]:
        return self.wall - sum(o.wall for o in others), self.processor - sum(o.processor for o in others)

    def around(self, function: Callable[..., Any], processor: Callable[[], float] = time.process_time) -> Any:
        def timed(*arguments: Any, **options: Any) -> Any:
            with self.running(processor):
                return function(*arguments, **options)

        return timed


def measure(model: Path, rules: str, output: Path) -> dict[str, tuple[float, float]]:
    """Rewrites and saves in this process; returns wall and processor seconds of each stage."""
    importing, loading, proving, applying, saving, quantizing = (Clock() for _ in range(6))
    with importing.running(time.process_time):
        import rewriter
        from rewriter import io, ruleset
        from rewriter.io import writes
        from rewriter.parity.local import LocalProver
        from rewriter.quantize import rows

    io.own_copy = loading.around(io.own_copy)
    prover = proving.around(LocalProver(ruleset.load(rules).parity))
    with applying.running(time.process_time):
        result = rewriter.apply(model, rules, prover=prover)
    pool = rows._pool()
    plain_map = pool.map
    pool.map = lambda task, *items: plain_map(quantizing.around(task, time.thread_time), *items)
    writes.packed_arrays = quantizing.around(writes.packed_arrays, time.thread_time)
    with saving.running(time.process_time):
        result.save(output)
    with applying.running(time.process_time):
        _ = result.report
    times = {
        "import": importing.without(),
        "load": loading.without(),
        "match": applying.without(loading, proving),
        "prove": proving.without(),
        "quantize": quantizing.without(),
        "write": saving.without(quantizing),
    }
    assert tuple(times) == STAGES
    return times


def child(model: Path, rules: str, processors: int) -> dict[str, Any]:
    """The seconds of each stage in a fresh process that may use so many processors, and what its own child took."""
    with tempfile.TemporaryDirectory(dir=model.parent) as scratch:
        command = [sys.executable, __file__, "--measure", str(model), "--rules", rules, "--output", f"{scratch}/out"]
        allowed = sorted(os.sched_getaffinity(0))[:processors]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, preexec_fn=lambda: os.sched_setaffinity(0, allowed)
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    times = json.loads(done.stdout.splitlines()[-1])
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {**times, "process of proofs": (0.0, used - sum(processor for _, processor in times.values()))}


COPY = """
import sys, time, onnx_ir as ir
start = time.process_time()
ir.save(ir.load(sys.argv[1]), sys.argv[2] + "/model.onnx", external_data="model.onnx.data")
print(time.process_time() - start)
"""


def copied(model: Path) -> float:
    """Processor seconds that onnx-ir takes to load a model and to write it, as its users would."""
    with tempfile.TemporaryDirectory(dir=model.parent) as scratch:
        command = [sys.executable, "-c", COPY, str(model), scratch]
        return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.5)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--rules", default="moe-int4")
    parser.add_argument("--directory", default=tempfile.gettempdir())
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.rules, options.output)))
        gc.freeze()  # as the command line ends: to take a graph apart again takes a second, and is no part of a run
        return
    import streaming

    with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
        model = streaming.make(Path(scratch), options.gigabytes, options.layers, options.experts, born=False)
        size = (Path(scratch) / "model.onnx.data").stat().st_size
        print(f"{options.rules}, {size / 1e9:.2f} GB, {options.layers} layers x {options.experts} experts\n")
        most = len(os.sched_getaffinity(0))
        counts = sorted({min(2, most), most})
        found = {count: child(model, options.rules, count) for count in counts}
        alone = copied(model)
    print("| stage |", " | ".join(f"wall s, {n} processors | processor s" for n in counts), "|")
    print("| --- " * (1 + 2 * len(counts)) + "|")
    for stage in (*STAGES, "process of proofs"):
        cells = [f"{found[n][stage][0]:.2f} | {found[n][stage][1]:.2f}" for n in counts]
        print(f"| {stage} |", " | ".join(cells), "|")
    sums = [[sum(times[i] for times in found[n].values()) for i in (0, 1)] for n in counts]
    print("| all |", " | ".join(f"{wall:.2f} | {processor:.2f}" for wall, processor in sums), "|")
    ratios = ", ".join(f"{processor / alone:.2f}" for _, processor in sums)
    print(f"\nonnx_ir.load and save of the same model: {alone:.2f} s of processor time; all to that: {ratios}")


if __name__ == "__main__":
    main()
