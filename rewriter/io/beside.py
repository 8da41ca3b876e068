"""What lies in a directory beside a model: what goes with it, and what is its own."""

from __future__ import annotations

import os
from pathlib import Path

import onnx_ir as ir

from rewriter.errors import UsageError
from rewriter.graph.contents import stored_tensors

_CONFIGURATION = (".json", ".txt", ".model", ".jinja")


def data_of(directory: Path, name: str) -> list[str]:
    """Returns the names of the data files in ``directory`` that its model ``name`` reads and no other model there."""
    named = locations(directory / name) or set()
    others = [locations(file) for file in directory.glob("*.onnx") if file.name != name] if named else []
    if None in others:
        return []  # whatever cannot be read may read them
    named -= {place for found in others for place in found or ()}
    return sorted(place for place in named if Path(place).name == place and (directory / place).is_file())


def others_of(model_file: Path, name: str, data_name: str | None) -> list[Path]:
    """Returns the files beside an input model that are copied to the output: tokenizer, configuration."""
    folder = model_file.parent
    files = sorted(f for f in folder.iterdir() if f.is_file() and not f.name.startswith("."))
    data = {f: locations(f) or set() for f in files if f.suffix == ".onnx"}
    package = next((f for f in files if f.name == "genai_config.json"), None)
    if package and name != model_file.name and f'"{model_file.name}"' in package.read_text(errors="replace"):
        raise UsageError(
            f"'{package}' names '{model_file.name}', so the output must too: give a directory without a name"
        )
    left = {f for f in data if f.name == model_file.name or not package}
    unused = {d for f in left for d in data[f]} - {d for f in data if f not in left for d in data[f]}
    others = [f for f in files if f not in left and f.name not in unused]
    if folder.name == "onnx":  # a repository for transformers.js: its tokenizer and configuration are one folder up
        taken = {f.name for f in files}
        others += sorted(f for f in folder.parent.iterdir() if f.suffix in _CONFIGURATION and f.name not in taken)
    data_file = data_name or f"{name}.data"
    for other in others:
        if other.name == name or other.name.startswith(data_file):
            raise UsageError(f"'{other}' is to be copied beside the output of that name; choose another name for it")
    return others


def locations(file: Path) -> set[str] | None:
    """Returns the names of the data files of a model; None for what cannot be read as one."""
    try:
        model = ir.load(file)
    except Exception:  # a file like any other
        return None
    return {
        os.path.normpath(s.tensor.location) for s in stored_tensors(model) if isinstance(s.tensor, ir.ExternalTensor)
    }
