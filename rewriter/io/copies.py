"""A model of one's own, whatever kind of model was given: its graphs may be edited, its weights are shared."""

from __future__ import annotations

import os
from typing import Protocol

import onnx
import onnx_ir as ir

from rewriter.errors import UsageError
from rewriter.io.functions import inline_functions
from rewriter.io.loading import copied, load, parsed


class Exported(Protocol):
    """What ``torch.onnx.export`` returns: an ``ONNXProgram``, which holds a model."""

    @property
    def model(self) -> ir.Model:
        """The exported model."""


Plain = str | os.PathLike[str] | ir.Model | onnx.ModelProto
"""A path, or a model in memory."""

Model = Plain | Exported
"""What a user may give."""


def own_copy(model: Model) -> ir.Model:
    """Returns a model that may be edited: graphs are copied, weights are shared.

    Functions through which weights are read are inlined.

    Raises:
        ModelError: the model is unreadable or invalid.
        UsageError: it is no model.
    """
    ours = as_model(model)
    inline_functions(ours)
    return ours


def as_model(model: Model) -> ir.Model:
    """Returns a model as ``onnx_ir`` has it: read from a file, or a copy whose weights are shared.

    Raises:
        ModelError: the model is unreadable or invalid.
        UsageError: it is no model.
    """
    given = held(model)
    if isinstance(given, str | os.PathLike):
        return load(given)
    return parsed(given) if isinstance(given, onnx.ModelProto) else copied(given)


def held(model: Model) -> Plain:
    """Returns a model as it is, or the one that an exported program holds.

    Raises:
        UsageError: it is no model.
    """
    if isinstance(model, str | os.PathLike | ir.Model | onnx.ModelProto):
        return model
    if isinstance(program := getattr(model, "model", None), ir.Model):
        return program
    kinds = "a path, an onnx_ir.Model, an onnx.ModelProto or what torch.onnx.export returns"
    raise UsageError(f"a model is {kinds}, not {type(model).__name__}")
