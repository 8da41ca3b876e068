"""What tying an embedding costs: bytes in the file, and memory that an ONNX Runtime CPU session adds when it loads.

    python benchmarks/embedding.py [--vocabulary 262144] [--hidden 2048] [--folder DIR]

The first table holds this project's two forms against the int4 files that onnxruntime-genai's builder wrote of the same
model at the same settings (tests/models). The second loads a tied model of the given size in a fresh process for each
form, by itself and with prepacking disabled, and prints by how much loading raised the process' private memory
(RssAnon; mapped pages of the file, which the system may drop at will, are in a column of their own).
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import tempfile
from pathlib import Path

import models
import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.tape import Tape

import rewriter
from rewriter.graph.contents import total_bytes

SAMPLES = Path(__file__).parents[1] / "tests" / "models" / "genai"
BUILDER = (
    ("llama_tied_int4_cpu_shared", {"algorithm": "rtn", "symmetric": True}),
    ("llama_tied_int4_cpu_shared_kquant", {"algorithm": "k-quant", "symmetric": False}),
)


def rule_set(form: str, level: int, **default: object) -> dict:
    """Ties, then quantizes every other linear."""
    tie = {"tie-quantized-embedding": {"form": form, "accuracy_level": level}}
    linears = {"matmul-to-matmul-nbits": {"accuracy_level": level}}
    phases = [{"name": "tie", "rules": [tie]}, {"name": "quantize", "rules": [linears]}]
    return {"phases": phases, "quantization": {"default": default}}


def sizes() -> None:
    print(f"{'':36}{'weights':>10}{'.onnx file':>12}")
    for name, default in BUILDER:
        theirs = onnx.load(SAMPLES / f"{name}.onnx")
        print(f"{name:36}{total_bytes(ir.from_proto(theirs)):10,}{theirs.ByteSize():12,}")
        for form in ("flat", "blocks"):
            ours = rewriter.apply(onnx.load(SAMPLES / "llama_tied_fp32_cpu.onnx"), rule_set(form, 4, **default))
            print(f"  {'ours, ' + form:34}{total_bytes(ours.ir_model):10,}{ours.model.ByteSize():12,}")


def tied_model(vocabulary: int, hidden: int, file: Path) -> ir.Model:
    """ids -> rows of w -> logits by the same w; float16 in the file, float32 in the graph."""
    tape = Tape()
    ids = ir.Value(name="ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch", "length"]))
    tensor = models.weights_on_disk(file)("w", (vocabulary, hidden))
    w = tape.initializer(tensor, "w")
    wide = tape.op("Cast", [w], {"to": ir.DataType.FLOAT})
    rows = tape.op("Gather", [wide, ids])
    logits = tape.op("MatMul", [rows, tape.op("Transpose", [wide], {"perm": [1, 0]})])
    logits.name = "logits"
    for value, width in ((rows, hidden), (logits, vocabulary)):
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", "length", width])
    graph = ir.Graph([ids], [logits], nodes=tape.nodes, initializers=[w], opset_imports={"": 21}, name="tied")
    return ir.Model(graph, ir_version=10)


def resident(kind: str) -> float:
    """Megabytes of this process in memory: private ones (RssAnon) or mapped pages of files (RssFile)."""
    return int(re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e3


def load(path: str, prepack: bool, answer: multiprocessing.Queue) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    before = resident("RssAnon"), resident("RssFile")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    session.run(None, {"ids": np.array([[0, 1, 2]])})
    answer.put((resident("RssAnon") - before[0], resident("RssFile") - before[1]))


def memory(vocabulary: int, hidden: int, level: int, folder: Path) -> None:
    file = folder / "tied.data"
    model = tied_model(vocabulary, hidden, file)
    print(f"\n{vocabulary} x {hidden}, float32 activations, accuracy level {level}; MB that a session adds")
    print(f"{'':26}{'in file':>9}{'private':>9}{'mapped':>9}{'private, mapped without prepacking':>36}")
    context = multiprocessing.get_context("spawn")
    for bits in (4, 8):
        for symmetric in (True, False):
            for form in ("flat", "blocks"):
                rules = rule_set(form, level, bits=bits, symmetric=symmetric) | {"parity": {"local": "none"}}
                saved = rewriter.apply(model, rules).save(folder / "out", overwrite=True)
                size = sum(part.stat().st_size for part in saved.parent.iterdir()) / 1e6
                found = []
                for prepack in (True, False):
                    queue = context.Queue()
                    process = context.Process(target=load, args=(str(saved), prepack, queue))
                    process.start()
                    found += queue.get()
                    process.join()
                label = f"{bits} bits {'symmetric' if symmetric else 'asymmetric':11} {form}"
                print(f"{label:26}{size:9,.0f}{found[0]:9,.0f}{found[1]:9,.0f}{found[2]:27,.0f}{found[3]:9,.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=262144)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--accuracy-level", type=int, default=0, help="of MatMulNBits")
    parser.add_argument("--folder", type=Path, default=None, help="scratch space; by default the system's")
    arguments = parser.parse_args()
    sizes()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        memory(arguments.vocabulary, arguments.hidden, arguments.accuracy_level, Path(folder))


if __name__ == "__main__":
    main()
