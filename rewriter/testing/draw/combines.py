"""How the experts that a router chose are put together: masks, dense weights, loops over the rows that chose them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto, numpy_helper

from rewriter.testing.draw.graph import FLOAT_TYPES, Scope

LOOPS = ("loop-add", "loop-in-place", "loop-any", "loop-filled")
"""One expert at a time on the rows that chose it; they need opset 16."""
COMBINES = ("mask-sum", "where", "slots", "one-hot", "scatter", "stacked", *LOOPS)
MISTAKES = ("missing-expert", "doubled-rows", "mask-off-by-one")
"""What makes a block another one; each model has at most one."""


@dataclass(frozen=True)
class Choice:
    """What a router says of x [T, H].

    Attributes:
        experts: E.
        top_k: k.
        dtype: of x and the weights.
        weights: [T, k].
        chosen: [T, k] ids.
    """

    experts: int
    top_k: int
    dtype: str
    weights: str
    chosen: str


Expert = Callable[[str, int], str]
"""Writes one expert of rows [.., H]."""


def combine(scope: Scope, x: str, choice: Choice, expert: Expert, how: str, mistake: str = "") -> str:
    """Writes the weighted sum [T, H] of the chosen experts.

    Args:
        scope: where it is written.
        x: the tokens.
        choice: of the router.
        expert: writes one expert.
        how: one of ``COMBINES``.
        mistake: one of ``MISTAKES``, or empty.
    """
    numbers = [e for e in range(choice.experts) if mistake != "missing-expert" or e != choice.experts - 1 or not e]
    twice = mistake == "doubled-rows"
    numbers = [*numbers, numbers[-1]] if twice else numbers
    shift = 1 if mistake == "mask-off-by-one" else 0
    if how == "stacked":
        return _stacked(scope, x, choice, expert, numbers, shift)
    if how in LOOPS:
        return _loop(scope, x, choice, expert, how, [(e, (e + shift) % choice.experts) for e in numbers])
    dense = _dense(scope, choice, how) if how in ("one-hot", "scatter") else ""
    terms = []
    for number in numbers:
        held = (number + shift) % choice.experts
        out = expert(x, number)
        if how == "slots":
            terms += [scope.op("Mul", out, _of_slot(scope, choice, held, slot)) for slot in range(choice.top_k)]
            continue
        column = scope.op("Gather", dense, scope.ints(held), axis=1) if dense else _share(scope, choice, held, how)
        terms.append(scope.op("Mul", out, column))
    return scope.total(terms)


def _mask(scope: Scope, choice: Choice, number: int) -> str:
    return scope.op("Equal", choice.chosen, scope.ints(number))


def _share(scope: Scope, choice: Choice, number: int, how: str) -> str:
    """The weight [T, 1] of one expert."""
    mask = _mask(scope, choice, number)
    if how == "where":
        weighed = scope.op("Where", mask, choice.weights, _zero(scope, choice))
    else:
        weighed = scope.op("Mul", choice.weights, scope.op("Cast", mask, to=FLOAT_TYPES[choice.dtype]))
    return scope.op("ReduceSum", weighed, scope.ints(-1), keepdims=1)


def _of_slot(scope: Scope, choice: Choice, number: int, slot: int) -> str:
    """The weight [T, 1] of one slot, where it holds the expert."""
    position = scope.ints(slot)
    held = scope.op("Equal", scope.op("Gather", choice.chosen, position, axis=1), scope.ints(number))
    weight = scope.op("Gather", choice.weights, position, axis=1)
    return scope.op("Mul", scope.op("Cast", held, to=FLOAT_TYPES[choice.dtype]), weight)


def _dense(scope: Scope, choice: Choice, how: str) -> str:
    """The weight [T, E] of every expert."""
    if how == "one-hot":
        pair = scope.constant("zero_one", np.array([0, 1], choice.dtype))
        hot = scope.op("OneHot", choice.chosen, scope.ints(choice.experts, scalar=True), pair, axis=-1)
        weighed = scope.op("Mul", hot, scope.op("Unsqueeze", choice.weights, scope.ints(-1)))
        return scope.op("ReduceSum", weighed, scope.ints(1), keepdims=0)
    rows = scope.op("Gather", scope.op("Shape", choice.chosen), scope.ints(0))
    shape = scope.op("Concat", rows, scope.ints(choice.experts), axis=0)
    zeros = scope.op("ConstantOfShape", shape, value=numpy_helper.from_array(np.zeros(1, choice.dtype)))
    return scope.op("ScatterElements", zeros, choice.chosen, choice.weights, axis=1)


def _stacked(scope: Scope, x: str, choice: Choice, expert: Expert, numbers: list[int], shift: int) -> str:
    """All outputs [T, E, H], times the dense weights [T, 1, E]."""
    outputs = [scope.op("Unsqueeze", expert(x, number), scope.ints(1)) for number in numbers]
    dense = _dense(scope, choice, "scatter")
    if numbers != list(range(choice.experts)) or shift:
        columns = [scope.op("Gather", dense, scope.ints((n + shift) % choice.experts), axis=1) for n in numbers]
        dense = scope.op("Concat", *columns, axis=1)
    mixed = scope.op("MatMul", scope.op("Unsqueeze", dense, scope.ints(1)), scope.op("Concat", *outputs, axis=1))
    return scope.op("Squeeze", mixed, scope.ints(1))


def _loop(scope: Scope, x: str, choice: Choice, expert: Expert, how: str, numbers: list[tuple[int, int]]) -> str:
    """One expert after the other on the rows that chose it, added to where they come from."""
    if how == "loop-filled":
        return _filled(scope, x, choice, expert, numbers)
    total = scope.op("Expand", _zero(scope, choice), scope.op("Shape", x))
    wide = scope.op("Unsqueeze", choice.weights, scope.ints(2)) if how != "loop-any" else ""
    for number, held in numbers:
        mask = _mask(scope, choice, held)
        if how == "loop-any":
            counted = scope.op("Cast", mask, to=TensorProto.INT64)
            slots = scope.op("ReduceSum", counted, scope.ints(-1), keepdims=0)
            token = scope.op("Transpose", scope.op("NonZero", scope.op("Greater", slots, scope.ints(0))), perm=[1, 0])
            share = scope.op("GatherND", _share(scope, choice, held, "mask-sum"), token)
        else:
            pairs = scope.op("Transpose", scope.op("NonZero", mask), perm=[1, 0])
            token = scope.op("Slice", pairs, scope.ints(0), scope.ints(1), scope.ints(1))
            share = scope.op("GatherND", wide, pairs)
        weighed = scope.op("Mul", expert(scope.op("GatherND", x, token), number), share)
        if how == "loop-in-place":
            total = scope.op("ScatterND", total, token, scope.op("Add", scope.op("GatherND", total, token), weighed))
        else:
            total = scope.op("ScatterND", total, token, weighed, reduction="add")
    return total


def _filled(scope: Scope, x: str, choice: Choice, expert: Expert, numbers: list[tuple[int, int]]) -> str:
    """Every token k times; each expert's outputs put where it was chosen, weighed and summed at the end."""
    k = choice.top_k
    again = scope.op("Expand", scope.op("Unsqueeze", x, scope.ints(1)), scope.ints(1, k, 1))
    features = scope.op("Slice", scope.op("Shape", x), scope.ints(1), scope.ints(2), scope.ints(0))
    rows = scope.op("Reshape", again, scope.op("Concat", scope.ints(-1), features, axis=0))
    flat = scope.op("Reshape", choice.chosen, scope.ints(-1))
    outputs = scope.op("Expand", _zero(scope, choice), scope.op("Shape", rows))
    for number, held in numbers:
        hits = scope.op("NonZero", scope.op("Equal", flat, scope.ints(held)))
        pair = scope.op("Transpose", hits, perm=[1, 0])
        outputs = scope.op("ScatterND", outputs, pair, expert(scope.op("GatherND", rows, pair), number))
    apart = scope.op("Reshape", outputs, scope.op("Concat", scope.ints(-1, k), features, axis=0))
    weighed = scope.op("Mul", apart, scope.op("Unsqueeze", choice.weights, scope.ints(2)))
    return scope.op("ReduceSum", weighed, scope.ints(1), keepdims=0)


def _zero(scope: Scope, choice: Choice) -> str:
    return scope.constant("zero", np.array(0, choice.dtype))
