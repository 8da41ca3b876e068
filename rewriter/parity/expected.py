"""How far the outputs of a rewritten model may be from the original's, going by what was quantized.

The limit is a wide one: it is there for what is wrong, not for what is coarse. Measured on the models of the tests
under five rule sets, right rewrites of dense models stay below 1.3 times the error of their weights; where a router
chooses experts, one token that goes to another expert adds up to 0.2, however small the error that sent it there.
"""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Iterable

import onnx_ir as ir

from rewriter.graph.contents import all_nodes
from rewriter.operators.form import operator_of
from rewriter.report import Weight

_EXACT = 0.01
_HALVES = 0.05
"""Where nothing is quantized: other kernels, which sum in another order, and round to halves."""

_COARSE = 0.05
_ROUTED = 0.25
"""Where something is: int8 activations; tokens that go to another expert."""

_GAIN = 2.0
_MOST = 1.0
"""An output as far away as this is no better than zeros."""


def expected_l2(model: ir.Model, weights: Iterable[Weight], *, quantized: bool) -> float:
    """Returns the largest relative L2 difference of an output that the quantization of a model's weights explains.

    Args:
        model: the rewritten model.
        weights: what was quantized in it, with the error of each.
        quantized: whether it holds quantized weights at all.
    """
    error = _error(weights)
    if not error and not quantized:
        halves = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
        return _HALVES if any(value.dtype in halves for value in model.graph.initializers.values()) else _EXACT
    return min(_MOST, (_ROUTED if _is_routed(model) else _COARSE) + _GAIN * error * _reads(model))


def _error(weights: Iterable[Weight]) -> float:
    """The errors of the layers added up as if independent; the experts of one layer share its tokens."""
    groups: dict[tuple[int | None, str], list[float]] = {}
    for weight in weights:
        key = (weight.layer, weight.role or weight.name)
        groups.setdefault(key, []).append(weight.relative_rms**2)
    return math.sqrt(math.fsum(statistics.fmean(group) for group in groups.values()))


def _reads(model: ir.Model) -> int:
    """How often one weight is used in succession, at most: its error is the same each time, and adds up."""
    readers: collections.Counter[tuple[ir.Value, str]] = collections.Counter()
    for node in all_nodes(model):
        stored = [value for value in node.inputs if value is not None and value.const_value is not None]
        codes = max(stored, key=_nbytes, default=None)
        if codes is not None and codes.dtype is not None and codes.dtype.bitwidth <= 8:
            readers[codes, node.op_type] += 1
    return max(readers.values(), default=1)


def _nbytes(value: ir.Value) -> int:
    return value.const_value.nbytes if value.const_value is not None else 0


def _is_routed(model: ir.Model) -> bool:
    return any(node.op_type == "TopK" or operator_of(node) is not None for node in all_nodes(model))
