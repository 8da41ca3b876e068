"""Rewrites a model far larger than the memory it may take, and says what that cost.

    python benchmarks/streaming.py [--gigabytes 20] [--rules moe-int4] [--directory /tmp]

Makes a float16 model with Gemma 4 26B-A4B's 30 layers of 128 experts (sizes scaled to the bytes asked for, weights in
external data), runs ``rewriter apply`` on it in a process of its own, and prints

- the peak of that process' anonymous resident memory (``RssAnon`` of /proc/PID/status, sampled every 20 ms: resident
  memory beyond mapped file pages) and of all its resident memory (``ru_maxrss``);
- its time beside what reading the input, writing the output and the bare kernels take, each measured in the same run.

- what looking for weights that were trained in few bits costs, by a dry run of that alone.

With ``--born`` the weights are such, on a grid of mxfp4. With ``--compare`` it runs a second time without the look;
processor times of both, which a busy machine disturbs least.
"""

from __future__ import annotations

import argparse
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import models
import numpy as np
import onnx_ir as ir

import rewriter
from rewriter.quantize import ALGORITHMS, WeightContext, WeightSpec, born
from rewriter.ruleset import load
from rewriter.tensors import View

LAYERS, EXPERTS, VOCABULARY_SHARE = 30, 128, 16
CHUNK = 1 << 24


def sizes(total: float) -> tuple[int, int]:
    """Hidden and intermediate size (a quarter) of a float16 model of ``total`` bytes."""
    hidden = round(math.sqrt(total / (2 * (LAYERS * (EXPERTS * 0.75 + 4) + VOCABULARY_SHARE))) / 128) * 128
    return hidden, hidden // 4


def make(directory: Path, gigabytes: float, layers: int, experts: int, *, born: bool) -> Path:
    hidden, intermediate = sizes(gigabytes * 1e9)
    model = models.unrolled_model(
        layers,
        experts,
        hidden=hidden,
        intermediate=intermediate,
        top_k=8,
        weights=models.weights_on_disk(directory / "model.onnx.data", born=born),
        vocabulary=hidden * VOCABULARY_SHARE,
    )
    ir.save(model, directory / "model.onnx")
    return directory / "model.onnx"


def sample_memory(process: subprocess.Popen[str], peak: list[int]) -> None:
    while process.poll() is None:
        try:
            text = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            return
        fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        if "RssAnon" in fields:
            peak[0] = max(peak[0], int(fields["RssAnon"].split()[0]) * 1024)
        time.sleep(0.02)


def run(command: list[str]) -> tuple[str, float, float, int]:
    """What a command printed, its seconds, its processor seconds, and its peak of anonymous memory in bytes."""
    peak = [0]
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    sampler = threading.Thread(target=sample_memory, args=(process, peak))
    sampler.start()
    text, _ = process.communicate()
    sampler.join()
    seconds = time.perf_counter() - start
    if process.returncode:
        print(text[-3000:])
        raise SystemExit(process.returncode)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return text, seconds, after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime, peak[0]


def look(model: Path, rules: str) -> tuple[int, float]:
    """How many weights and stacks are looked at, and the processor seconds of that."""
    found, plain = [], born.look

    def timed(view: View) -> born.Look:
        start = time.process_time()
        try:
            return plain(view)
        finally:
            found.append(time.process_time() - start)

    born.look = timed
    rewriter.explain(model, rules=rules)
    born.look = plain
    return len(found), sum(found)


def read_all(path: Path) -> float:
    start = time.perf_counter()
    with path.open("rb", buffering=0) as stream:
        while stream.read(CHUNK):
            pass
    return time.perf_counter() - start


def write_all(path: Path, size: int) -> float:
    block = os.urandom(CHUNK)
    start = time.perf_counter()
    with path.open("wb", buffering=0) as stream:
        for _ in range(size // CHUNK):
            stream.write(block)
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


def kernels(spec: WeightSpec, weights: int) -> float:
    """Seconds that the algorithm alone takes for so many weights, extrapolated from a sixteenth of a billion."""
    generator = np.random.default_rng(0)
    part = (generator.standard_normal((4096, 4096), dtype=np.float32) * np.float32(0.02)).astype(np.float16)
    context = WeightContext(spec, np.dtype(np.float16))
    quantize = ALGORITHMS[spec.algorithm]
    quantize(part[:64], context)
    start = time.perf_counter()
    for _ in range(4):
        quantize(part, context)
    return (time.perf_counter() - start) * weights / (4 * part.size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=20)
    parser.add_argument("--experts", type=int, default=EXPERTS)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--rules", default="moe-int4")
    parser.add_argument("--directory", default=tempfile.gettempdir())
    parser.add_argument("--memory", default="")
    parser.add_argument("--born", action="store_true", help="weights that were trained in mxfp4")
    parser.add_argument("--compare", action="store_true", help="run once more without the look for such weights")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
        folder = Path(scratch)
        model = make(folder, options.gigabytes, options.layers, options.experts, born=options.born)
        data = folder / "model.onnx.data"
        size = data.stat().st_size
        print(f"input: {size / 1e9:.2f} GB, {options.layers} layers x {options.experts} experts")
        output = folder / "out"
        command = [sys.executable, "-m", "rewriter", "apply", str(model), "-o", str(output), "--rules", options.rules]
        if options.memory:
            command += ["--memory", options.memory]
        text, seconds, processor, peak = run(command)
        print(text[-3000:])
        written = sum(file.stat().st_size for file in output.iterdir())
        largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        reading = read_all(data)
        shutil.rmtree(output)
        writing = write_all(folder / "scratch", written)
        computing = kernels(load(options.rules).plan.default, size // 2)
        floor = reading + writing + computing
        print("| what | figure |\n|---|---|")
        print(f"| output | {written / 1e9:.2f} GB |")
        print(f"| peak anonymous resident memory | {peak / 2**30:.2f} GiB |")
        print(f"| peak resident memory, mapped file pages included | {largest / 2**30:.2f} GiB |")
        print(f"| time | {seconds:.1f} s |")
        print(f"| processor time | {processor:.1f} s |")
        parts = f"{reading:.1f} + {writing:.1f} + {computing:.1f} s"
        print(f"| reading the input + writing the output + bare kernels | {parts} |")
        print(f"| ratio | {seconds / floor:.2f} |")
        looks, looking = look(model, options.rules)
        print(f"| the look itself, by a dry run | {looks:,} weights, {looking:.2f} s, {looking / processor:.2%} |")
        if options.compare:
            algorithm = load(options.rules).plan.default.algorithm
            _, seconds, other, peak = run([*command, "--set", f"quantization.default.algorithm={algorithm}"])
            print(f"| without the look: time | {seconds:.1f} s |")
            print(f"| without the look: processor time | {other:.1f} s, {processor / other - 1:+.1%} with it |")
            print(f"| without the look: peak anonymous resident memory | {peak / 2**30:.2f} GiB |")


if __name__ == "__main__":
    main()
