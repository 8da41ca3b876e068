"""Where in a rule something failed: file and line, for the one line that people read."""

from __future__ import annotations

import traceback
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxscript

_OURS = Path(__file__).parents[1]
_LIBRARIES = tuple(Path(str(module.__file__)).parent for module in (np, ir, onnxscript))


def line_of(error: BaseException) -> str:
    """Returns `` (file:line)`` of the deepest frame that is a rule's; empty where there is none."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_of_a_rule(Path(frame.filename))]
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def _is_of_a_rule(file: Path) -> bool:
    if file.is_relative_to(_OURS):
        return file.is_relative_to(_OURS / "rules")
    return not any(file.is_relative_to(library) for library in _LIBRARIES)
