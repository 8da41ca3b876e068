"""Rates and errors of every quantization algorithm, beside ONNX Runtime's own on the same weights in one run.

    python benchmarks/quantize.py --size 4096 --seed 0

Rates are the best over the three distributions and the repeats, in millions of weights a second of processor time, so
that other work on the machine changes them little; ORT's k-quant runs once on each distribution. The ratio to it is of
what all cores do to what it does, since it runs on one of them. Errors are relative RMS.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace

import ml_dtypes
import numpy as np

from rewriter.process import processors
from rewriter.quantize import ALGORITHMS as KNOWN
from rewriter.quantize import QuantizedWeight, WeightContext, WeightSpec, relative_rms
from rewriter.quantize.formats import FORMATS
from rewriter.quantize.lossless import bits_per_weight

ALGORITHMS = {name: quantize for name, quantize in KNOWN.items() if name != "lossless"}
"""Those that fit a weight; lossless takes only what lies on a grid."""

FIRST_USE = """
import time
start = time.perf_counter()
import numpy as np
from rewriter.quantize import ALGORITHMS, WeightContext, WeightSpec, relative_rms
imported = time.perf_counter()
weight = np.ones((1, 32), np.float32)
for name, quantize in ALGORITHMS.items():
    result = quantize(weight, WeightContext(WeightSpec(name), np.dtype(np.float32)))
relative_rms(weight, result)
print(imported - start, time.perf_counter() - imported)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the weights, a multiple of 128")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()

    rng = np.random.default_rng(options.seed)
    shape = (options.size, options.size)
    weights = {
        "N(0,1)": rng.standard_normal(shape, np.float32),
        "t(4)": rng.standard_t(4, shape).astype(np.float32),
        "N(1,1)": rng.standard_normal(shape, np.float32) + np.float32(1),
    }
    print(f"{options.size} x {options.size}, seed {options.seed}, {processors()} cores\n")
    first_use()
    for block in (32, 128):
        speed(weights, block, options.repeat)
    storage(weights["N(0,1)"])
    formats({name: weight[: max(1, options.size // 8)] for name, weight in weights.items()})
    other_widths({name: weight[: max(1, options.size // 8)] for name, weight in weights.items()})


def first_use() -> None:
    """The first call in a process compiles, or loads what an earlier process compiled."""
    print("| first use | import, s | every kernel, s |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as cache:
        for when in ("nothing cached", "cached on disk"):
            environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
            command = [sys.executable, "-c", FIRST_USE]
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            imported, ready = (float(figure) for figure in done.stdout.split())
            print(f"| {when} | {imported:.2f} | {ready:.2f} |")
    print()


def speed(weights: dict[str, np.ndarray], block: int, repeat: int) -> None:
    """Four bits, asymmetric, float32: rates and errors, and their ratios to ORT's."""
    runs = {f"ORT {name}": run for name, run in (("rtn, C++", ort_rtn), ("k-quant, NumPy", ort_k_quant))} | {
        name: ours(name) for name in ALGORITHMS
    }
    rates: dict[str, float] = dict.fromkeys(runs, 0.0)
    errors: dict[str, dict[str, float]] = {name: {} for name in runs}
    for kind, weight in weights.items():
        for _ in range(repeat):
            for name, run in runs.items():
                if name == "ORT k-quant, NumPy" and kind in errors[name]:
                    continue
                seconds, result = run(weight, 4, block, False)
                rates[name] = max(rates[name], weight.size / seconds / 1e6)
                errors[name][kind] = relative_rms(weight, result)
    print(f"4 bits, asymmetric, blocks of {block}, float32\n")
    print(
        "| algorithm | M weights/s a core | to ORT rtn | to ORT k-quant, all cores |",
        " | ".join(weights),
        "| to ORT k-quant |",
    )
    print("| --- " * (5 + len(weights)) + "|")
    rtn, k_quant = "ORT rtn, C++", "ORT k-quant, NumPy"
    for name in runs:
        cores = 1 if name == k_quant else processors()
        to_k_quant = cores * rates[name] / rates[k_quant]
        cells = [f"{rates[name]:.1f}", f"{rates[name] / rates[rtn]:.2f} x", f"{to_k_quant:.1f} x"]
        cells += [f"{error:.4f}" for error in errors[name].values()]
        cells.append(", ".join(f"{error / errors[k_quant][kind]:.3f}" for kind, error in errors[name].items()))
        print(f"| {name} |", " | ".join(cells), "|")
    print()


def storage(weight: np.ndarray) -> None:
    """How the weight is stored: 4 bits, asymmetric, blocks of 32."""
    forms = {
        "float32": weight,
        "float16": weight.astype(np.float16),
        "bfloat16": weight.astype(ml_dtypes.bfloat16),
        "float32, transposed": np.asfortranarray(weight),
    }
    print("M weights/s a core by storage, 4 bits, asymmetric, blocks of 32\n")
    print("| stored as |", " | ".join(ALGORITHMS), "| relative_rms |")
    print("| --- " * (2 + len(ALGORITHMS)) + "|")
    for form, stored in forms.items():
        cells = []
        for name in ALGORITHMS:
            seconds, result = min((ours(name)(stored, 4, 32, False) for _ in range(3)), key=lambda run: run[0])
            cells.append(f"{stored.size / seconds / 1e6:.1f}")
        start = time.process_time()
        relative_rms(stored, result)
        cells.append(f"{stored.size / (time.process_time() - start) / 1e6:.1f}")
        print(f"| {form} |", " | ".join(cells), "|")
    print()


def formats(weights: dict[str, np.ndarray]) -> None:
    """Errors of every format without zero points, by the plain rule and by the search, on an eighth of the rows."""
    specs = {
        "4 bits, blocks of 32": WeightSpec("", 4, 32),
        "mxfp4": WeightSpec("", 4, 32, format="mxfp4"),
        "nvfp4": WeightSpec("", 4, 16, format="nvfp4"),
        "3 bits, blocks of 32": WeightSpec("", 3, 32),
    }
    print("Relative RMS error, symmetric:", ", ".join(weights), "\n")
    print("| format | bits a weight | rtn | mse-search | search to plain rule |\n| --- | --- | --- | --- | --- |")
    for name, spec in specs.items():
        errors = {}
        for algorithm in ("rtn", "mse-search"):
            own = replace(spec, algorithm=algorithm)
            scale = FORMATS[spec.format].scale_dtype or np.dtype(np.float16)
            made = [(w, ALGORITHMS[algorithm](w, WeightContext(own, scale))) for w in weights.values()]
            errors[algorithm] = [relative_rms(*pair) for pair in made]
        cells = [", ".join(f"{error:.4f}" for error in found) for found in errors.values()]
        ratios = ", ".join(f"{b / a:.3f}" for a, b in zip(*errors.values(), strict=True))
        bits = bits_per_weight(spec, next(iter(weights.values())).shape[1], np.dtype(np.float16))
        print(f"| {name} | {bits:.4g} |", " | ".join(cells), f"| {ratios} |")
    print()


def other_widths(weights: dict[str, np.ndarray]) -> None:
    """Errors of all widths and symmetries, on an eighth of the rows."""
    print("Relative RMS error:", ", ".join(weights), "\n")
    print(
        "| bits | block | symmetry | ORT rtn |", " | ".join(ALGORITHMS), "|\n" + "| --- " * (4 + len(ALGORITHMS)) + "|"
    )
    for bits in (2, 4, 8):
        for block in (32, 128):
            for symmetric in (True, False):
                cells = []
                for run in (ort_rtn, *map(ours, ALGORITHMS)):
                    results = [(weight, run(weight, bits, block, symmetric)[1]) for weight in weights.values()]
                    cells.append(", ".join(f"{relative_rms(weight, result):.4f}" for weight, result in results))
                print(f"| {bits} | {block} | {'symmetric' if symmetric else 'asymmetric'} |", " | ".join(cells), "|")


def ours(name: str):
    def run(weight: np.ndarray, bits: int, block: int, symmetric: bool) -> tuple[float, QuantizedWeight]:
        context = WeightContext(WeightSpec(name, bits, block, symmetric), weight.dtype)
        start = time.process_time()
        result = ALGORITHMS[name](weight, context)
        return time.process_time() - start, result

    return run


def ort_rtn(weight: np.ndarray, bits: int, block: int, symmetric: bool) -> tuple[float, QuantizedWeight]:
    from onnxruntime.capi import _pybind_state as ort

    (n, k), blocks = weight.shape, weight.shape[1] // block
    turned = np.ascontiguousarray(weight.T)
    packed = np.zeros((n, blocks, block * bits // 8), np.uint8)
    scales = np.zeros(n * blocks, weight.dtype)
    zeros = np.zeros(n * -(-blocks * bits // 8), np.uint8)
    start = time.process_time()
    getattr(ort, f"quantize_matmul_{bits}bits")(packed, turned, scales, zeros, block, n, k, symmetric)
    seconds = time.process_time() - start
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes, zeros = ((data.reshape(n, -1)[..., None] >> shifts & (1 << bits) - 1) for data in (packed, zeros))
    zero_points = None if symmetric else zeros.reshape(n, -1)[:, :blocks]
    return seconds, QuantizedWeight(codes.reshape(n, k), scales.reshape(n, blocks), zero_points, bits, block)


def ort_k_quant(weight: np.ndarray, bits: int, block: int, symmetric: bool) -> tuple[float, QuantizedWeight]:
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

    start = time.process_time()
    codes, scales, zeros = quant_tensor_k_quant_cpu(weight, bits, block)
    seconds = time.process_time() - start
    shape = (len(weight), -1)
    scales = scales.astype(np.float32).reshape(shape)
    return seconds, QuantizedWeight(
        codes.astype(np.uint8).reshape(weight.shape), scales, zeros.reshape(shape), bits, block
    )


if __name__ == "__main__":
    main()
