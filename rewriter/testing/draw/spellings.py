"""The spellings of one static selection: from a stack of experts to one expert's matrix, and to its product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from rewriter.testing.draw.graph import FLOAT_TYPES, Scope

SELECTIONS = (
    "gather",
    "gather-list",
    "gather-negative",
    "gather-int32",
    "slice",
    "slice-negative",
    "slice-backwards",
    "split",
    "split-lengths",
    "split-to-sequence",
    "split-to-sequence-kept",
    "gather-nd",
    "reshape-slice",
)
DROPS = ("squeeze", "squeeze-negative", "squeeze-all", "reshape", "reshape-infer", "keep")
TURNS = ("transpose", "transpose-default", "gemm")
NOISES = ("none", "identity", "cast", "unsqueeze", "twice", "flat")
_INT64_MAX = 2**63 - 1


@dataclass(frozen=True)
class Stack:
    """A constant stack of experts.

    Attributes:
        name: of the constant.
        experts: how many.
        rows: first dimension of a matrix as it is stored.
        columns: second dimension of a matrix as it is stored.
        axis: where the experts are.
        dtype: element type.
    """

    name: str
    experts: int
    rows: int
    columns: int
    dtype: str
    axis: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The three dimensions in the order in which they are stored."""
        dims = [self.rows, self.columns]
        dims.insert(self.axis, self.experts)
        return tuple(dims)


@dataclass(frozen=True)
class Spelling:
    """How one expert's matrix is taken from its stack.

    Attributes:
        selection: one of ``SELECTIONS``.
        drop: how an axis of extent 1 goes, one of ``DROPS``.
        turn: how a matrix stored [N, K] becomes [K, N], one of ``TURNS``; no matter where it is stored [K, N].
        early: noise before the selection, one of ``NOISES``.
        late: noise after it, one of ``NOISES``.
    """

    selection: str = "gather"
    drop: str = "squeeze"
    turn: str = "transpose"
    early: str = "none"
    late: str = "none"


@dataclass(frozen=True)
class Matrix:
    """One expert's matrix, taken from its stack.

    Attributes:
        name: of its value.
        rank: 2, or 3 with a leading 1.
        chain: every value on the way from the stack.
    """

    name: str
    rank: int
    chain: tuple[str, ...]


@st.composite
def spellings(draw: st.DrawFn, selections: Sequence[str] = SELECTIONS) -> Spelling:
    return Spelling(
        draw(st.sampled_from(selections)),
        draw(st.sampled_from(DROPS)),
        draw(st.sampled_from(TURNS)),
        draw(st.sampled_from(NOISES)),
        draw(st.sampled_from(NOISES)),
    )


def select(scope: Scope, stack: Stack, expert: int, how: Spelling, *, rank3: bool) -> Matrix:
    """Writes the nodes that take one expert's matrix [rows, columns] out; ``rank3`` allows [1, rows, columns]."""
    selection = how.selection
    if stack.axis and selection in ("gather-nd", "reshape-slice"):
        selection = "gather"
    chain = [_noise(scope, how.early, stack.name, stack.shape, stack.dtype)]
    value, kept = _pick(scope, stack, chain[0], expert, selection)
    chain.append(value)
    if kept:
        drop = how.drop
        if drop == "keep" and not (rank3 and stack.axis == 0):
            drop = "squeeze"
        if drop == "squeeze-all" and 1 in (stack.rows, stack.columns):
            drop = "squeeze"
        if drop == "keep":
            return Matrix(value, 3, tuple(chain[1:]))
        chain.append(_drop(scope, stack, value, drop))
    chain.append(_noise(scope, how.late, chain[-1], (stack.rows, stack.columns), stack.dtype))
    return Matrix(chain[-1], 2, tuple(chain[1:]))


def squeeze(scope: Scope, value: str, axes: tuple[int, ...]) -> str:
    """Writes a Squeeze of the opset at hand."""
    if scope.opset < 13:
        return scope.op("Squeeze", value, axes=list(axes))
    return scope.op("Squeeze", value, scope.ints(*axes))


def unsqueeze(scope: Scope, value: str, axes: tuple[int, ...]) -> str:
    """Writes an Unsqueeze of the opset at hand."""
    if scope.opset < 13:
        return scope.op("Unsqueeze", value, axes=list(axes))
    return scope.op("Unsqueeze", value, scope.ints(*axes))


def _pick(scope: Scope, stack: Stack, source: str, expert: int, selection: str) -> tuple[str, bool]:
    """Returns the selected value, and whether the experts' axis is still there."""
    axis, count = stack.axis, stack.experts
    if selection in ("gather", "gather-negative", "gather-int32"):
        where = expert - count if selection == "gather-negative" else expert
        index = scope.ints(where, scalar=True, dtype=np.int32 if selection == "gather-int32" else np.int64)
        return scope.op("Gather", source, index, axis=axis), False
    if selection == "gather-list":
        return scope.op("Gather", source, scope.ints(expert), axis=axis), True
    if selection in ("slice", "slice-negative", "slice-backwards"):
        start, end, step = expert, expert + 1, 1
        if selection == "slice-negative":
            start, end = expert - count, _INT64_MAX if expert == count - 1 else expert + 1
        elif selection == "slice-backwards":
            start, end, step = expert, expert - 1 - count, -1
        bounds = [scope.ints(start), scope.ints(end), scope.ints(axis)]
        return scope.op("Slice", source, *bounds, *([scope.ints(step)] if step != 1 else [])), True
    if selection == "split":
        attributes: dict[str, Any] = {"num_outputs": count} if scope.opset >= 18 else {}
        return scope.ops("Split", source, count=count, axis=axis, **attributes)[expert], True
    if selection == "split-lengths":
        lengths = [n for n in (expert, 1, count - expert - 1) if n]
        if scope.opset < 13:
            parts = scope.ops("Split", source, count=len(lengths), axis=axis, split=lengths)
        else:
            parts = scope.ops("Split", source, scope.ints(*lengths), count=len(lengths), axis=axis)
        return parts[1 if expert else 0], True
    if selection in ("split-to-sequence", "split-to-sequence-kept"):
        kept = selection == "split-to-sequence-kept"
        sequence = scope.op("SplitToSequence", source, axis=axis, keepdims=int(kept))
        return scope.op("SequenceAt", sequence, scope.ints(expert, scalar=True)), kept
    if selection == "gather-nd":
        return scope.op("GatherND", source, scope.ints(expert)), False
    assert selection == "reshape-slice"
    flat = scope.op("Reshape", source, scope.ints(-1, stack.columns))
    start = expert * stack.rows
    return scope.op("Slice", flat, scope.ints(start), scope.ints(start + stack.rows), scope.ints(0)), False


def _drop(scope: Scope, stack: Stack, value: str, drop: str) -> str:
    if drop == "squeeze":
        return squeeze(scope, value, (stack.axis,))
    if drop == "squeeze-negative":
        return squeeze(scope, value, (stack.axis - 3,))
    if drop == "squeeze-all":
        return scope.op("Squeeze", value)
    return scope.op("Reshape", value, scope.ints(-1 if drop == "reshape-infer" else stack.rows, stack.columns))


def _noise(scope: Scope, noise: str, value: str, shape: tuple[int, ...], dtype: str) -> str:
    """Writes operators that leave the value as it is."""
    if noise == "identity":
        return scope.op("Identity", value)
    if noise == "cast":
        return scope.op("Cast", value, to=FLOAT_TYPES[dtype])
    if noise == "unsqueeze":
        return squeeze(scope, unsqueeze(scope, value, (1,)), (1,))
    if noise == "twice":
        rank = len(shape)
        forth = [*range(1, rank), 0]
        back = [rank - 1, *range(rank - 1)]
        return scope.op("Transpose", scope.op("Transpose", value, perm=forth), perm=back)
    if noise == "flat":
        return scope.op("Reshape", scope.op("Reshape", value, scope.ints(-1)), scope.ints(*shape))
    return value


def turn(scope: Scope, matrix: str, how: str) -> str:
    attributes: dict[str, Any] = {} if how == "transpose-default" else {"perm": [1, 0]}
    return scope.op("Transpose", matrix, **attributes)
