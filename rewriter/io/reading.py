"""From bytes on disk to a message: what is not ONNX, or not all of it, is refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import onnx

from rewriter.errors import ModelError, reason


def model_file(path: Path) -> Path:
    """Returns the absolute path of the model file that ``path`` names.

    Args:
        path: a file, or a directory that holds one model, or has it in ``onnx/`` as repositories for transformers.js
            do. Of several, that which a ``genai_config.json`` there names as the decoder, or ``model.onnx`` where all
            others are its variants (``model_q4.onnx``).

    Raises:
        ModelError: there is none, or there are several.
    """
    try:
        found = _models_in(path) if path.is_dir() else [path] if path.exists() else None
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if found is None:
        raise ModelError(f"there is no file '{path}'; {_how_to_export(path)}")
    if not found:
        raise ModelError(f"the directory '{path}' holds no .onnx file; give the path of a model")
    if len(found) > 1:
        found = _main(path, found)
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ModelError(f"'{path}' holds several models ({names}); name one of them")
    if not found[0].is_file():  # reading a pipe would wait without end
        raise ModelError(f"'{found[0]}' is not a regular file; give the path of an .onnx model")
    return found[0].absolute()


def _models_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.onnx")) or sorted((folder / "onnx").glob("*.onnx"))


def _main(folder: Path, found: list[Path]) -> list[Path]:
    """The model of several that is meant where none is named; all where nothing tells."""
    decoder = _decoder(folder)
    if chosen := [file for file in found if file.name == decoder]:
        return chosen
    if all(file.stem == "model" or file.stem.startswith("model_") for file in found):
        return [file for file in found if file.stem == "model"] or found
    return found


def _decoder(folder: Path) -> str:
    """The file that ONNX Runtime GenAI's configuration names as the decoder; empty where there is none."""
    try:
        config = json.loads((folder / "genai_config.json").read_bytes())
        return str(config["model"]["decoder"]["filename"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _how_to_export(path: Path) -> str:
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and path.suffix != ".onnx" and not path.parent.exists():
        return (
            f"if that is a model of the Hugging Face Hub, export it first: optimum-cli export onnx --model {path}"
            f" {path.name}, or python -m onnxruntime_genai.models.builder -m {path} -o {path.name} -p fp16 -e cpu"
        )
    return "give the path of an .onnx model"


def read_proto(file: Path) -> onnx.ModelProto:
    """Reads a model file, without its external data.

    Raises:
        ModelError: it cannot be read, is not ONNX, or is truncated.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise _unreadable(file, error) from error
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except Exception as error:  # protobuf's DecodeError has no public import that type checkers know
        raise ModelError(f"'{file}' is not an ONNX model, or is truncated; {_hint(data)}") from error
    if not is_whole(proto):
        if len(proto.graph.node) and not proto.opset_import:
            raise ModelError(f"'{file}' does not say which operators it imports (opset_import); export the model again")
        raise ModelError(f"'{file}' is not an ONNX model, or is truncated; {_hint(data)}")
    return proto


def is_whole(proto: onnx.ModelProto) -> bool:
    """Whether a message has what every model has; of arbitrary bytes protobuf often makes an empty one."""
    return proto.HasField("graph") and proto.ir_version > 0 and len(proto.opset_import) > 0


def _unreadable(path: Path, error: OSError | ValueError) -> ModelError:
    return ModelError(f"'{path}' cannot be read ({reason(error)}); give the path of an .onnx model")


def _hint(data: bytes) -> str:
    if data.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer: run git lfs pull"
    if data[4:8] == b"ORTM":
        return "it is in ONNX Runtime's own format (.ort): give the .onnx model that it was made from"
    return "the file is empty" if not data else "download or export it again"
