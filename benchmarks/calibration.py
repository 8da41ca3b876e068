"""Measures calibration and the quantization that goes by it.

    python benchmarks/calibration.py memory [--gigabytes 20] [--tokens 4096] [--limit 1GiB] [--model DIRECTORY]
    python benchmarks/calibration.py rates [--most 4096]
    python benchmarks/calibration.py model MODEL.onnx --tokens TOKENS.npy [--rules gptq-int4]

``memory`` makes the model of ``streaming.py``, calibrates it in a process of its own, in runs of 512 tokens, and prints
the peak of that process' anonymous resident memory. ``rates`` quantizes one weight [1024, K] by 2 K inputs for each K,
4 bits in blocks of 32 with zero points, and prints processor seconds of all cores. ``model`` times the capture of
16,384 tokens, and the quantization of every weight by what it saw, without the start of a process and the proofs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import streaming

import rewriter
from rewriter.budget.samples import quantized_jobs
from rewriter.quantize import ALGORITHMS, WeightContext, WeightSpec
from rewriter.quantize.blas import one_thread
from rewriter.quantize.hessian import Hessian

RUN = 512


def memory(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
        folder = Path(scratch)
        model = options.model and Path(options.model) / "model.onnx"
        model = model or streaming.make(folder, options.gigabytes, options.layers, options.experts, born=False)
        size = (model.parent / "model.onnx.data").stat().st_size
        (x,) = ir.load(model).graph.inputs
        feeds = folder / "feeds"
        feeds.mkdir()
        generator = np.random.default_rng(0)
        for run in range(options.tokens // RUN):
            rows = generator.standard_normal((RUN, int(x.shape[1])), dtype=np.float32)
            np.savez(feeds / f"{run}.npz", **{x.name: rows.astype(x.dtype.numpy())})
        out = folder / "calibration"
        command = [sys.executable, "-m", "rewriter", "calibrate", str(model), "--feeds", str(feeds), "-o", str(out)]
        peak = [0]
        start = time.perf_counter()
        process = subprocess.Popen([*command, "--memory", options.limit, "--quiet"])
        sampler = threading.Thread(target=streaming.sample_memory, args=(process, peak))
        sampler.start()
        process.wait()
        sampler.join()
        if process.returncode:
            raise SystemExit(process.returncode)
        seconds = time.perf_counter() - start
        written = sum(file.stat().st_size for file in out.iterdir())
        print(f"{size / 1e9:.1f} GB on {options.tokens:,} tokens, --memory {options.limit}: {seconds:.0f} s")
        print(f"peak anonymous resident memory {peak[0] / 2**30:.2f} GiB; the folder takes {written / 1e9:.2f} GB")


def rates(options: argparse.Namespace) -> None:
    print("| K | tokens | Hessian, s | all, s | M weights/s | mse-search, M weights/s | all, s on the clock |")
    print("|---|---|---|---|---|---|---|")
    for k in (256 << step for step in range(10)):
        if k <= options.most:
            print(_rate(k), flush=True)


def _rate(k: int) -> str:
    generator = np.random.default_rng(0)
    inputs = generator.standard_normal((2 * k, k), dtype=np.float32)
    weight = generator.standard_normal((1024, k), dtype=np.float32).astype(np.float16)
    context = WeightContext(WeightSpec("gptq", symmetric=False), np.dtype(np.float16), activations=lambda: inputs)
    ALGORITHMS["gptq"](weight[:64], context)
    spent, clock = [], []
    for task in (
        lambda: _hessian(inputs),
        lambda: ALGORITHMS["gptq"](weight, context),
        lambda: ALGORITHMS["mse-search"](weight, context),
    ):
        start, used = time.perf_counter(), time.process_time()
        task()
        spent.append(time.process_time() - used)
        clock.append(time.perf_counter() - start)
    found = [f"{seconds:.2f}" for seconds in spent[:2]]
    found += [f"{weight.size / seconds / 1e6:.2f}" for seconds in spent[1:]]
    found.append(f"{clock[1]:.1f}")
    return f"| {k} | {len(inputs)} | {' | '.join(found)} |"


def _hessian(inputs: np.ndarray) -> None:
    with one_thread():
        Hessian.of(inputs, "", inputs.shape[1])


def model(options: argparse.Namespace) -> None:
    tokens = np.load(options.tokens).reshape(-1)[:16384].astype(np.int64).reshape(-1, 256)
    with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
        start, used = time.perf_counter(), time.process_time()
        calibration = rewriter.calibrate(options.model, Path(scratch) / "c", tokens=tokens)
        print(f"capture of {tokens.size:,} tokens: {time.perf_counter() - start:.1f} s, {_used(used)}")
        result = rewriter.apply(
            options.model, options.rules, calibration=calibration, overrides={"parity.local": "none"}
        )
        jobs = quantized_jobs(result)
        jobs[0].quantize()
        start, used = time.perf_counter(), time.process_time()
        for job in jobs:
            job.quantize()
        count = sum(job.weight.size for job in jobs)
        print(f"{options.rules} of {count / 1e6:.1f} M weights: {time.perf_counter() - start:.1f} s, {_used(used)}")


def _used(before: float) -> str:
    return f"{time.process_time() - before:.1f} s of processor time"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", default=tempfile.gettempdir())
    tasks = parser.add_subparsers(required=True)
    one = tasks.add_parser("memory")
    one.add_argument("--gigabytes", type=float, default=20)
    one.add_argument("--experts", type=int, default=streaming.EXPERTS)
    one.add_argument("--layers", type=int, default=streaming.LAYERS)
    one.add_argument("--tokens", type=int, default=4096)
    one.add_argument("--limit", default="1GiB")
    one.add_argument("--model", default="", help="a directory with such a model, in place of making one")
    one.set_defaults(task=memory)
    one = tasks.add_parser("rates")
    one.add_argument("--most", type=int, default=4096)
    one.set_defaults(task=rates)
    one = tasks.add_parser("model")
    one.add_argument("model")
    one.add_argument("--tokens", required=True)
    one.add_argument("--rules", default="gptq-int4")
    one.set_defaults(task=model)
    options = parser.parse_args()
    options.task(options)


if __name__ == "__main__":
    main()
