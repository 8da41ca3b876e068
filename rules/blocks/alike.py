"""Whether two experts are one: the same operators on equal weights, be they one constant or two."""

from __future__ import annotations

import numpy as np

from rewriter.rules.blocks.contents import Dense, Linear, Output, Packed, Weight
from rewriter.tensors import View


def same_expert(a: Output, b: Output) -> bool:
    """Whether both return the same of the same tokens. Equal weights may be stored twice, as exporters fold them."""
    if a == b:
        return True
    return (
        (a.activation, a.by) == (b.activation, b.by)
        and _same_linear(a.gate, b.gate)
        and _same_linear(a.up, b.up)
        and _same_weight(a.down, b.down)
        and _equal(a.bias, b.bias)
    )


def _same_linear(a: Linear | None, b: Linear | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.x is b.x and a.share == b.share and _same_weight(a.weight, b.weight) and _equal(a.bias, b.bias)


def _same_weight(a: Weight, b: Weight) -> bool:
    if isinstance(a, Dense) and isinstance(b, Dense):
        return _equal(a.view, b.view)
    if not isinstance(a, Packed) or not isinstance(b, Packed) or (a.k, a.bits, a.block) != (b.k, b.bits, b.block):
        return False
    return _equal(a.codes, b.codes) and _equal(a.scales, b.scales) and _equal(a.zero_points, b.zero_points)


def _equal(a: View | None, b: View | None) -> bool:
    if a is None or b is None or a == b:
        return a == b
    return (a.shape, a.dtype) == (b.shape, b.dtype) and np.array_equal(np.asarray(a.numpy()), np.asarray(b.numpy()))
