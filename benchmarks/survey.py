"""What becomes of every MoE block of an installed transformers: exported by each exporter, fused or not, and why.

    python benchmarks/survey.py --match mixtral

It needs torch and transformers beside this project. Each block is built from its model's own configuration, made
tiny, with random weights; exported in a process of its own, forked from one that has imported torch; and given to the
rule sets. The table says what was fused,
how far the result is from torch, and the first reason where nothing was. A spelling that a new release brings is a line
here.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import io
import multiprocessing
import pkgutil
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_FORK = multiprocessing.get_context("fork")
EXPORTERS = ("dynamo", "dynamo-raw", "torchscript")
SETS = ("fuse-experts", "moe-int4")
_BLOCK = re.compile(r"(SparseMoeBlock|SparseMoE|MoeBlock|MoEBlock|MoE|Moe|MoEGate|SparseMLP|FeedForwardMoE)$")
_SMALL = {
    "hidden_size": 64, "d_model": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "ffn_dim": 64,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8, "expert_ffn_hidden_size": 32,
    "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "n_group": 1, "topk_group": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 1, "vocab_size": 256, "n_shared_experts": 1, "head_dim": 16,
    "shared_expert_intermediate_size": 32, "zero_expert_num": 2, "num_expert_groups": 1,
}  # fmt: skip


def blocks(match: str) -> Iterator[tuple[str, str]]:
    """Yields (module, class) of every MoE block of the installed transformers."""
    import transformers.models

    for found in pkgutil.iter_modules(transformers.models.__path__):
        if match not in found.name:
            continue
        name = f"transformers.models.{found.name}.modeling_{found.name}"
        try:
            module = importlib.import_module(name)
        except Exception:  # a model that lacks what it needs is none to be surveyed
            continue
        for cls, held in inspect.getmembers(module, inspect.isclass):
            if held.__module__ == name and _BLOCK.search(cls) and not cls.endswith(("ForCausalLM", "Model")):
                yield name, cls


def small_config(module: Any) -> Any:
    """Returns the configuration of a model, or of its text, with small numbers."""
    home = importlib.import_module(module.__name__.replace("modeling_", "configuration_"))
    found = [
        c
        for n, c in inspect.getmembers(home, inspect.isclass)
        if n.endswith("Config") and c.__module__ == home.__name__
    ]
    found.sort(key=lambda c: (not hasattr(c(), "hidden_size"), "Text" not in c.__name__, len(c.__name__)))
    config = found[0]()
    for name, value in _SMALL.items():
        with contextlib.suppress(Exception):  # some say each layer's own, and some check what they are given
            known = getattr(config, name)
            setattr(config, name, [value] * len(known) if isinstance(known, list | tuple) else value)
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "batched_mm"
    return config


def export(module: str, cls: str, exporter: str, out: Path) -> None:
    """Exports one block, with what torch makes of an input beside it."""
    import numpy as np
    import torch

    torch.manual_seed(0)
    home = importlib.import_module(module)
    made = getattr(home, cls)
    layer = {"layer_idx": 0} if "layer_idx" in inspect.signature(made.__init__).parameters else {}
    block = made(small_config(home), **layer).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1)

    class First(torch.nn.Module):
        """The block, without the logits that some return beside."""

        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.block(x)
            return y[0] if isinstance(y, tuple) else y

    x = torch.randn(1, 7, 64)
    with torch.no_grad():
        np.savez(out.with_suffix(".npz"), x=x.numpy(), y=First()(x).numpy())
        if exporter == "torchscript":
            options: dict[str, Any] = {"dynamo": False, "dynamic_axes": {"x": {1: "S"}}, "opset_version": 17}
        else:
            dynamic = {"x": {1: torch.export.Dim("S", min=2)}}
            options = {
                "dynamo": True,
                "dynamic_shapes": dynamic,
                "optimize": exporter == "dynamo",
                "external_data": False,
            }
        torch.onnx.export(First(), (x,), str(out), input_names=["x"], output_names=["y"], **options)


def exported(module: str, cls: str, exporter: str, out: Path, timeout: float) -> str:
    """Exports one block in a process of its own; returns why it did not, or nothing."""
    receiver, sender = _FORK.Pipe(duplex=False)

    def run() -> None:
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                export(module, cls, exporter, out)
            sender.send("")
        except BaseException as error:  # whatever an exporter raises is a cell of the table
            sender.send(f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason'])[0]}")

    child = _FORK.Process(target=run)
    child.start()
    why = str(receiver.recv()) if receiver.poll(timeout) else f"no export in {timeout:g} s"
    child.kill()
    child.join()
    return why


def judged(path: Path, rules: str) -> str:
    """Returns a cell: how many operators, how far from torch; or why none."""
    import numpy as np
    import onnxruntime

    import rewriter

    result = rewriter.apply(path, rules)
    with tempfile.TemporaryDirectory() as folder:
        written = result.save(Path(folder) / "out")
        held = np.load(path.with_suffix(".npz"))
        (y,) = onnxruntime.InferenceSession(str(written)).run(None, {"x": held["x"]})
    error = np.linalg.norm(y - held["y"]) / np.linalg.norm(held["y"])
    count = sum(node.op_type in ("MoE", "QMoE") for node in result.ir_model.graph)
    reason = next((d.reason for d in result.report.declines if d.rule == "fuse-experts"), "")
    return f"{count} fused, {error:.1e}" if count else f"apart, {error:.1e}: {reason}"


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--match", default="", help="part of a model's name")
    parser.add_argument("--exporters", nargs="*", default=EXPORTERS, choices=EXPORTERS)
    parser.add_argument("--sets", nargs="*", default=SETS)
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one export")
    asked = parser.parse_args()
    importlib.import_module("torch").set_num_threads(1)
    print("| block | exporter |", " | ".join(asked.sets), "|", flush=True)
    print("|---|---|" + "---|" * len(asked.sets))
    for module, cls in blocks(asked.match):
        for exporter in asked.exporters:
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "block.onnx"
                why = exported(module, cls, exporter, out, asked.timeout)
                try:
                    cells = [judged(out, rules) for rules in asked.sets] if not why else []
                except Exception as error:  # one block must not end the survey
                    cells, why = [], f"{type(error).__name__}: {error}"
            told = " | ".join(cells or [f"not exported or run: {why[:100]}"] * len(asked.sets)).replace("\n", " ")
            print(f"| {cls} | {exporter} | {told} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
