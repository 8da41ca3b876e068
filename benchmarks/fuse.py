"""What fusing is worth: unrolled experts, one MatMulNBits for each matrix, one MoE, one QMoE; and what it costs.

    python benchmarks/fuse.py [--layers 4] [--experts 64] [--hidden 512] [--intermediate 256]

First table: session load, decode (1 token) and 32-token latency of each form under ONNX Runtime's CPU provider, and
file size. Second table: what fusing takes at 30 layers, by number of experts: it is linear. Third: what it takes where
the same experts are in a loop over the rows that chose them (``--only loop`` prints that alone).
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import models
import numpy as np
import onnxruntime

import rewriter
from rewriter.parity import apart

NOTHING = {"description": "Copies and checks.", "phases": [{"name": "nothing", "rules": ["qmoe-to-moe"]}]}
FORMS = {
    "unrolled, fp32 (original)": NOTHING,
    "unrolled, int4 MatMulNBits": "experts-int4",
    "MoE, fp32": "fuse-experts",
    "QMoE, int4": "moe-int4",
    "QMoE, int8, rounded activations": {"extends": "moe-int8", "rounded_activations": True},
}


def timed(function: Any, *arguments: Any, **options: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function(*arguments, **options)
    return time.perf_counter() - start, result


def latency(session: Any, x: np.ndarray[Any, Any], runs: int) -> float:
    """Median seconds of a run."""
    session.run(None, {"x": x})
    return statistics.median(timed(session.run, None, {"x": x})[0] for _ in range(runs))


def measure(path: Path, hidden: int, runs: int) -> tuple[float, float, float, float]:
    """Load, decode and prefill seconds, and megabytes on disk."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    load, session = timed(onnxruntime.InferenceSession, str(path), options, providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(0)
    decode, prefill = (
        latency(session, generator.standard_normal((tokens, hidden), dtype=np.float32), runs) for tokens in (1, 32)
    )
    return load, decode, prefill, sum(file.stat().st_size for file in path.parent.iterdir()) / 1e6


def forms(options: argparse.Namespace) -> None:
    model = models.unrolled_model(
        options.layers, options.experts, hidden=options.hidden, intermediate=options.intermediate, top_k=options.top_k
    )
    shape = f"hidden {options.hidden}, intermediate {options.intermediate}, top {options.top_k}"
    print(f"{options.layers} layers x {options.experts} experts, {shape}; seconds, milliseconds, MB\n")
    print("| form | rewrite s | load s | 1 token ms | 32 tokens ms | MB | load | 1 token | 32 tokens |")
    print("|---|---|---|---|---|---|---|---|---|")
    first: tuple[float, ...] = ()
    for name, rules in FORMS.items():
        if options.only not in name:
            continue
        with tempfile.TemporaryDirectory(dir=options.directory) as directory:
            seconds, result = timed(rewriter.apply, model, rules)
            path = result.save(Path(directory) / "out")
            *times, megabytes = measure(path, options.hidden, options.runs)
        first = first or tuple(times)
        ratios = " | ".join(f"{a / b:.1f}x" for a, b in zip(first, times, strict=True))
        load, decode, prefill = times
        cells = f"{load:.2f} | {1e3 * decode:.2f} | {1e3 * prefill:.1f} | {megabytes:.0f}"
        print(f"| {name} | {seconds:.2f} | {cells} | {ratios} |", flush=True)


def cpu(function: Any, *arguments: Any, **options: Any) -> float:
    """Seconds of this process and of the worker that runs models, whatever else the machine does."""
    start = seconds()
    function(*arguments, **options)
    return seconds() - start


def seconds() -> float:
    """Processor time so far."""
    fields = (Path(f"/proc/{w.process.pid}/stat").read_text().rpartition(")")[2].split() for w in apart._WORKERS)
    return time.process_time() + sum((int(f[11]) + int(f[12])) / os.sysconf("SC_CLK_TCK") for f in fields)


def rewriting(options: argparse.Namespace) -> None:
    print("\nCPU seconds of fuse-experts\n")
    print("| layers x experts | nodes | copy and check | facts and rewriting | proof |\n|---|---|---|---|---|")
    for experts in (options.most // 4, options.most // 2, options.most):
        model = models.unrolled_model(options.deep, experts)
        copying = cpu(rewriter.apply, model, NOTHING)
        whole, proved = (
            cpu(rewriter.apply, model, "fuse-experts", overrides={"parity.local": level}) for level in ("none", "class")
        )
        cells = f"{copying:.2f} | {whole - copying:.2f} | {proved - whole:.2f}"
        print(f"| {options.deep} x {experts} | {model.graph.num_nodes()} | {cells} |", flush=True)


def looping(options: argparse.Namespace) -> None:
    print("\nCPU seconds of fuse-experts with its proofs, unrolled and as a loop: the least of three turns\n")
    print("| layers x experts | nodes | nodes of the loop | unrolled | loop | ratio | ratio of nodes |")
    print("|---|---|---|---|---|---|---|")
    for experts in (1, options.most // 4, options.most // 2, options.most):  # the first one starts the worker
        both = [
            models.unrolled_model(options.deep, experts, top_k=min(2, experts), loop=loop) for loop in (False, True)
        ]
        turns = [[cpu(rewriter.apply, model, "fuse-experts") for model in both] for _ in range(3)]
        unrolled, loop = (min(times) for times in zip(*turns, strict=True))
        nodes = [model.graph.num_nodes() for model in both]
        cells = f"{nodes[0]} | {nodes[1]} | {unrolled:.2f} | {loop:.2f} | {loop / unrolled:.2f}"
        if experts > 1:
            print(f"| {options.deep} x {experts} | {cells} | {nodes[1] / nodes[0]:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--deep", type=int, default=30, help="layers of the second table")
    parser.add_argument("--most", type=int, default=128, help="experts of its last row")
    parser.add_argument("--directory", help="where models are written and removed")
    parser.add_argument("--only", default="", metavar="TEXT", help="forms whose name has it, and no second table")
    options = parser.parse_args()
    if options.only != "loop":
        forms(options)
    if not options.only:
        rewriting(options)
    if options.only in ("", "loop"):
        looping(options)


if __name__ == "__main__":
    main()
