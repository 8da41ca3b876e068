"""Biases and factors: a constant, or what a router's choice gathers from one, for the features of an expert."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from rewriter.rule import Declined
from rewriter.rules.blocks.axes import Content, Located, feature, find, fits
from rewriter.rules.blocks.contents import By, Dense, Factor, Features, Output, Router, Slot
from rewriter.rules.blocks.laws import of_constant, of_number, of_two
from rewriter.rules.blocks.mixing import Stack
from rewriter.tensors import View, scaled


@of_constant.at("Add")
def add_bias(data: Located, bias: View, node: ir.Node) -> Content | None:
    """Returns the content with a constant added to its features."""
    return with_bias(data, bias)


def with_bias(data: Located, bias: View) -> Content | None:
    """Returns the content with a constant added to its features, or None where it is not a bias."""
    position = find(data.axes, "feature")
    if position is None or not fits(bias.shape, data.axes) or not bias.dtype.is_floating_point():
        return None
    aligned = (*(1,) * (data.rank - bias.rank), *bias.shape)
    n = total_features(data)
    expert = find(data.axes, "expert")
    wide = expert is not None and aligned[expert] != 1
    if aligned[position] != n or any(d != 1 for i, d in enumerate(aligned) if i not in (position, expert)):
        return None
    by = _by(data.content)
    if by == "one":
        return _biased(data.content, bias.reshape((n,)))
    if wide and expert is not None:
        if by != "all" or expert > position:
            return None
        return _biased(data.content, bias.reshape((aligned[expert], n)))
    chosen = by.router if isinstance(by, Slot) else by
    experts = chosen.experts if isinstance(chosen, Router) else total_experts(data)
    if experts is None or by is None:
        return None
    row = bias.reshape((n,))
    return _biased(data.content, dataclasses.replace(row, shape=(experts, n), strides=(0, *row.strides)))


@of_two.at("Add")
def add_chosen_bias(data: Located, other: Located, node: ir.Node) -> Content | None:
    """Returns the content with each chosen expert's bias [E, N] added."""
    stack = other.content
    if not isinstance(stack, Stack) or stack.view.rank != 2 or _by(data.content) != stack.by:
        return None
    return _biased(data.content, stack.view)


@of_constant.at("Mul")
def scale_features(data: Located, factors: View, node: ir.Node) -> Output | None:
    """Returns what an expert returns with each feature times a number of its own: another weight makes it."""
    n = total_features(data)
    if data.axes[-1:] == (feature(n or 0),) and factors.shape[-1:] == (n,) and factors.size == n:
        return _scaled(data.content, factors.reshape((n,)).numpy().tolist(), node) if n else None
    return None


@of_number.at("Mul", "Div")
def scale_output(data: Located, number: float, node: ir.Node) -> Output | None:
    """Returns what an expert returns, times a number of its own."""
    n = total_features(data)
    if n is None or not number:
        return None
    return _scaled(data.content, [number if node.op_type == "Mul" else 1 / number] * n, node)


def _scaled(held: Content, factors: list[float], node: ir.Node) -> Output | None:
    if not isinstance(held, Output) or not isinstance(held.down, Dense) or held.by != "one":
        return None
    if held.gate.share is not None:
        return None
    if held.down.dtype != ir.DataType.FLOAT:
        raise Declined(f"a factor for an expert would round its {held.down.dtype.name} weights", node)
    bias = None if held.bias is None else scaled(held.bias, factors)
    return dataclasses.replace(held, down=Dense(scaled(held.down.view, factors)), bias=bias)


def total_features(data: Located) -> int | None:
    """Returns how many features there are, where they are one dimension."""
    position = find(data.axes, "feature")
    return None if position is None else data.axes[position][0].size.constant


def total_experts(data: Located) -> int | None:
    """Returns how many experts there are, where they are one dimension."""
    position = find(data.axes, "expert")
    return None if position is None else data.axes[position][0].size.constant


def _by(held: Content) -> By | None:
    if isinstance(held, Features):
        return held.factors[0].linear.by
    return held.by if isinstance(held, Output) else None


def _biased(held: Content, bias: View) -> Content | None:
    if isinstance(held, Output):
        return dataclasses.replace(held, bias=bias) if held.bias is None and held.gate.share is None else None
    if not isinstance(held, Features) or len(held.factors) != 1:
        return None
    factor = held.factors[0]
    if factor.steps or factor.linear.bias is not None or factor.linear.share is not None:
        return None
    return Features((Factor(dataclasses.replace(factor.linear, bias=bias)),))
