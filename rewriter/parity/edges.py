"""Further inputs of a proof: other numbers of rows, infinite logits, rows of zeros, numbers where functions turn.

Those are beyond what is clamped or saturates, so large that exponentials overflow, halves of what is rounded, and so
small that a norm is its epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.engine.proposal import Rewrite
from rewriter.operators.form import is_experts
from rewriter.tensors import constant

Array = npt.NDArray[Any]

_ROWS = (0, 1, 17)
"""None at all, one, and more than a kernel takes at once."""

_FEW = 2
"""Rows where values are at their edges."""

_BEYOND = 16
"""How many times a limit the numbers are that are clamped to it: weights make less of them on the way."""

_LARGEST = 1000
"""Limit above which it is none of an activation, but what keeps a half float finite."""

_OVERFLOWS = 128
"""What the exponential of is no float32 any more."""

_SMALL = 1 / 512
"""What makes numbers of size one so small that their mean square is near the epsilons that norms add to it."""

_CODES = 255
"""Most steps that a quantized number is from zero."""

_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_RANKS = ("TopK", "Softmax", "Sigmoid", "ArgMax", "ReduceMax")
_CLAMPS = ("Clip", "Min", "Max")


@dataclass(frozen=True)
class Variation:
    """Another way to draw inputs.

    Attributes:
        rows: size of each symbolic dimension; None for all different.
        infinite: what the least logit of a row becomes; numbers that are not at their edges where it is 0.
        scale: what other numbers are multiplied by, so that they reach the limits of clamps.
        ties: whether a row may hold nothing but zeros, as padding does, so that all experts are alike to it.
        halved: whether numbers are whole ones and halves, which may be rounded up, down or to even ones.
        signed: whether integers that are no index may be negative.
    """

    rows: int | None = None
    infinite: float = 0.0
    scale: float = 1.0
    ties: bool = False
    halved: bool = False
    signed: bool = False


def variations(fed: Iterable[ir.Value], rewrite: Rewrite) -> list[Variation]:
    """Returns the ways to draw what is fed to a rewrite, besides the first one."""
    fed = list(fed)
    free = _are_free(fed, rewrite)
    halves = any(value.dtype in _HALVES for value in fed)  # of few rows, what they round is much of the largest value
    rows = (_ROWS[-1] if halves else _FEW) if free else None
    scale, alike = _beyond(fed, rewrite), _decide_alike(rewrite)
    halved = any(node.op_type == "Round" for node in rewrite.matched)
    return [
        *(Variation(rows) for rows in (_ROWS if free else ())),
        *(Variation(rows, infinite, scale, alike, halved) for infinite in (-math.inf, math.inf)[: 1 + alike]),
        *([Variation(rows, -math.inf, _SMALL)] if not halves and _divides_by_norm(rewrite) else ()),
        *([Variation(rows, -math.inf, scale, alike, halved, signed=True)] if any(map(_is_signed, fed)) else ()),
    ]


def _is_signed(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_integer() and value.dtype.is_signed()


def _divides_by_norm(rewrite: Rewrite) -> bool:
    nodes = (*rewrite.matched, *rewrite.nodes)
    return any(n.op_type.endswith("Normalization") or n.op_type in ("ReduceMean", "ReduceL2") for n in nodes)


def lacks_rows(value: ir.Value, found: Array, fed: Iterable[ir.Value]) -> bool:
    """Whether an empty array has another shape than its value declares, where all inputs have no rows.

    A Reshape to -1 has nothing to go by then, and says 1.
    """
    names = {dim.value for v in fed for dim in v.shape or () if isinstance(dim, ir.SymbolicDim)}
    dims = () if value.shape is None else value.shape
    rows = [isinstance(dim, ir.SymbolicDim) and dim.value is not None and dim.value in names for dim in dims]
    return not found.size and any(size for size, none in zip(found.shape, rows, strict=False) if none)


def _decide_alike(rewrite: Rewrite) -> bool:
    """Whether both sides treat equal and infinite logits alike: the kernels of MoE and QMoE do not.

    Of equal ones TopK takes the first, these take the last, and not all of them do.
    """
    return not any(map(is_experts, (*rewrite.matched, *rewrite.nodes)))


def _are_free(fed: Sequence[ir.Value], rewrite: Rewrite) -> bool:
    """Whether some dimension may have any size."""
    told = (rewrite.fed[value].shape for value in fed if value in rewrite.fed)
    return any(names for shape in told for _, names in shape) or any(
        not isinstance(dim, int) for value in fed if value not in rewrite.fed for dim in value.shape or ()
    )


def _beyond(fed: Sequence[ir.Value], rewrite: Rewrite) -> float:
    """What makes numbers of size one reach the largest limit that the matched nodes clamp to; 1 where they do not.

    Halves are not scaled: kernels sum them in other orders, and what they round would be all that there is to see.
    """
    if any(value.dtype in _HALVES for value in fed):
        return 1.0
    limits = [1 / _BEYOND]
    for node in rewrite.matched:
        names = [name for name in ("min", "max", "swiglu_limit") if name in node.attributes]
        limits += [abs(node.attributes[name].as_float()) for name in names]
        views = [constant(v) for v in node.inputs if v is not None] if node.op_type in _CLAMPS else []
        limits += [abs(view.number) for view in views if view is not None and view.size == 1]
        steps = constant(node.inputs[1]) if node.op_type == "QuantizeLinear" and node.inputs[1] is not None else None
        limits += [] if steps is None or not steps.size else [_CODES * float(np.max(steps.numpy()))]
    overflowing = _OVERFLOWS if any(node.op_type == "Exp" for node in rewrite.nodes) else 1.0
    return max(overflowing, _BEYOND * max(limit for limit in limits if limit <= _LARGEST))


def are_scores(value: ir.Value, rewrite: Rewrite) -> bool:
    """Whether the matched nodes rank or normalize the value as it is: infinite ones have a meaning there."""
    return any(use.node in rewrite.matched and use.idx == 0 and use.node.op_type in _RANKS for use in value.uses())


def floats_at_edges(drawn: Array, how: Variation, *, logits: bool, positive: bool = False) -> Array:
    """Returns drawn numbers, some rows of them all zeros, others beyond limits.

    Args:
        drawn: numbers, the rows along all axes but the last.
        how: says whether, and how far.
        logits: whether experts are chosen by them: one of each row is infinite then.
        positive: whether they stay so.
    """
    if not how.infinite or drawn.ndim < 2 or not drawn.size or positive:
        return drawn
    found = drawn if logits else drawn * how.scale
    found = np.round(found * 2) / 2 if how.halved else found
    rows = found.reshape(-1, found.shape[-1])
    if logits:
        rows[np.arange(len(rows)), rows.argmin(axis=1)] = how.infinite
    if how.ties:
        rows[: len(rows) // 2] = 0
    return rows.reshape(found.shape)


def integers_at_edges(
    generator: np.random.Generator, shape: tuple[int, ...], rows: int | None, *, signed: bool = False
) -> Array:
    """Draws integers: of a table's rows half by negative numbers, which count from its end; others larger than one."""
    if rows is None:
        return generator.integers(-6 if signed else 0, 6, shape)
    drawn = generator.integers(0, rows, shape)
    drawn.reshape(-1)[::2] -= rows
    return drawn
