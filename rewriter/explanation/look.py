"""``rewriter.inspect``: what a model is, whatever kind of model was given."""

from __future__ import annotations

from rewriter import io
from rewriter.inspection import model as inspection
from rewriter.inspection.model import ModelInfo


def inspect(model: io.Model) -> ModelInfo:
    """Says what a model is: layers, MoE blocks and their form, weights by role. Nothing is quantized, run or written.

    Args:
        model: as for ``rewriter.apply``.

    Raises:
        ModelError: the model is unreadable or invalid.
        UsageError: it is no model.
    """
    return inspection.inspect(io.as_model(model))
