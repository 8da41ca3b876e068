"""What quantization costs whole models: each algorithm beside ONNX Runtime's own MatMulNBitsQuantizer.

    python benchmarks/whole_model.py [--models tests/models] [--block 32] [--match mobius]

ONNX Runtime's quantizer does not see weights that come out of a Gather, so it is given the *unstacked* model, and told
to quantize the very MatMuls that the rule set ``experts-int4`` (widened to every linear layer but the router) does.
Figures are relative L2 errors of all float outputs against the original, on the inputs beside the model.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime import InferenceSession, set_default_logger_severity

import rewriter

EVERY_LINEAR = {"quantization.include": [{"role": "*"}], "quantization.exclude": [{"role": "router"}]}
ALGORITHMS = (("rtn", True), ("rtn", False), ("k-quant", False), ("mse-search", True), ("mse-search", False))


def run(path: Path, feeds: dict[str, Any]) -> dict[str, Any]:
    session = InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def relative_l2(expected: dict[str, Any], actual: dict[str, Any]) -> float:
    pairs = [(e.astype(np.float64), actual[n].astype(np.float64)) for n, e in expected.items() if e.dtype.kind == "f"]
    return float(np.sqrt(sum(((e - a) ** 2).sum() for e, a in pairs) / sum((e**2).sum() for e, _ in pairs)))


def ours(model: Path, out: Path, algorithm: str, symmetric: bool, block: int) -> rewriter.Report:
    default = {"algorithm": algorithm, "symmetric": symmetric, "block_size": block, "bits": 4}
    overrides = {**EVERY_LINEAR, **{f"quantization.default.{key}": value for key, value in default.items()}}
    result = rewriter.apply(model, "experts-int4", overrides=overrides)
    result.save(out)
    return result.report


def theirs(model: Path, out: Path, nodes: set[str], config: Any) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    proto = onnx.load(model)
    left = [n.name for n in proto.graph.node if n.op_type == "MatMul" and n.name not in nodes]
    quantizer = MatMulNBitsQuantizer(proto, algo_config=config, nodes_to_exclude=left)
    with contextlib.redirect_stdout(io.StringIO()):
        quantizer.process()
    onnx.save(quantizer.model.model, out)


def peers(block: int) -> dict[str, Any]:
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        KQuantWeightOnlyQuantConfig,
    )

    return {
        "ORT rtn sym": DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=True),
        "ORT rtn asym": DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=False),
        "ORT k-quant": KQuantWeightOnlyQuantConfig(),
    }


def row(model: Path, block: int) -> dict[str, str]:
    stored = np.load(model.with_suffix(".npz"))
    feeds = {name[3:]: stored[name] for name in stored.files if name.startswith("in:")}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        expected = run(model, feeds)
        cells: dict[str, str] = {}
        nodes: set[str] = set()
        for algorithm, symmetric in ALGORITHMS:
            label = f"{algorithm} {'sym' if symmetric else 'asym'}"
            out = folder / label.replace(" ", "-")
            report = ours(model, out, algorithm, symmetric, block)
            nodes |= {a.node for a in report.applications if "MatMulNBits" in a.by and "MatMul" in a.replaced}
            cells[label] = f"{relative_l2(expected, run(next(out.glob('*.onnx')), feeds)):.4f}"
        if not nodes:
            return {}
        unstacked = folder / "unstacked"
        rewriter.apply(model, "unstack").save(unstacked)
        for label, config in peers(block).items():
            out = folder / f"{label.replace(' ', '-')}.onnx"
            try:
                theirs(next(unstacked.glob("*.onnx")), out, nodes, config)
                cells[label] = f"{relative_l2(expected, run(out, feeds)):.4f}"
            except Exception as error:  # a quantizer that fails, or writes what its own runtime refuses, is a result
                cells[label] = f"fails ({type(error).__name__})"
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path(__file__).parent.parent / "tests" / "models")
    parser.add_argument("--match", default="")
    parser.add_argument("--block", type=int, default=32)
    options = parser.parse_args()
    set_default_logger_severity(4)
    logging.disable(logging.INFO)
    heading: list[str] = []
    for npz in sorted(options.models.glob("*/*.npz")):
        model = npz.with_suffix(".onnx")
        if options.match not in str(npz) or not model.exists():
            continue
        if "MatMul" not in {node.op_type for node in onnx.load(model).graph.node}:
            continue
        cells = row(model, options.block)
        if not cells:
            continue
        if not heading:
            heading = list(cells)
            print(f"| model | {' | '.join(heading)} |\n|---|{'---|' * len(heading)}")
        print(f"| {npz.parent.name}/{npz.stem} | {' | '.join(cells[name] for name in heading)} |", flush=True)


if __name__ == "__main__":
    main()
