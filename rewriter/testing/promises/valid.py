"""onnx's checker accepts a rewritten model wherever it accepts the original."""

from __future__ import annotations

import onnx


def check_valid(before: bytes, after: bytes) -> None:
    """Holds a result to what the checker says of it and of the model.

    Raises:
        AssertionError: the checker refuses the result only.
    """
    refused = fault(onnx.load_from_string(after))
    assert not refused or fault(onnx.load_from_string(before)), (
        f"the checker accepts the model and refuses the result: {refused}"
    )


def fault(model: onnx.ModelProto) -> str:
    """Returns why the checker refuses the model; empty where it accepts it."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return str(error)
    return ""
