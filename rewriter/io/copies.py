"""A model of one's own, whatever kind of model was given: its graphs may be edited, its weights are shared."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Protocol

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from rewriter.errors import UsageError
from rewriter.io.loading import copied, load, parsed
from rewriter.io.sequences import untyped_sequences


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

    Types are inferred where those that a proof has to know are missing; not else, since it takes a copy of the graph.
    What the model declares of its inputs and outputs stays as it is.

    Raises:
        ModelError: the model is unreadable or invalid.
        UsageError: it is no model.
    """
    ours = as_model(model)
    declared = [(v, v.type, v.shape and v.shape.copy()) for v in (*ours.graph.inputs, *ours.graph.outputs)]
    if any(_lacks_type(node.inputs[0]) for node in ours.graph if node.op_type in _TYPED):
        with _quiet("onnx_ir.passes.common.shape_inference"):
            order, sequences = list(ours.graph.initializers.values()), untyped_sequences(ours)
            ShapeInferencePass()(ours)
            ours.graph.initializers.clear()  # the pass puts large ones last
            ours.graph.initializers.update((value.name or "", value) for value in order)
        for value in sequences:
            value.type = value.shape = None
        for value, dtype, shape in declared:
            value.type, value.shape = dtype, shape
    return ours


_TYPED = ("MatMul", "Gemm", "Einsum")


def _lacks_type(value: ir.Value | None) -> bool:
    return value is not None and (value.type is None or value.shape is None)


@contextlib.contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Inference that fails leaves the model as it was; the traceback that onnx-ir logs would reach the user."""
    log = logging.getLogger(logger)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


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
