"""Whether a float weight was quantized before and widened again: then a few of its blocks lie on a grid of few bits."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from rewriter.quantize.born import look
from rewriter.quantize.lossless import bits_per_weight, show
from rewriter.tensors import View

_LEAST = 1 << 10
"""Elements of a weight that is looked at."""


def born_as(tensor: ir.TensorProtocol) -> str:
    """Returns the grid on which a sample of a float weight lies, and its bits per weight; empty where it lies on none.

    Args:
        tensor: [N, K] or [K, N], or a stack of such.
    """
    if tensor.size < _LEAST or not tensor.dtype.is_floating_point() or len(tensor.shape) not in (2, 3):
        return ""
    found = [
        (bits_per_weight(spec, view.shape[-1], view.dtype.numpy()), show(spec))
        for view in _turned(View.whole(tensor, tensor.name or ""))
        for spec in look(view).specs[:1]
    ]
    if not found:
        return ""
    bits, grid = min(found)  # the other way round, a weight may lie on a longer one by chance
    return f"on a grid of {grid}: {bits:.4g} bits without loss"


def _turned(view: View) -> Iterator[View]:
    """The weight with its last axis as input features, and with the one before it."""
    yield view
    yield view.transpose((*range(view.rank - 2), view.rank - 1, view.rank - 2))
