"""One content of all experts out of one for each, as concatenated rows, or outputs, hold them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rewriter.facts import Facts
from rewriter.rules.blocks.axes import Content, Located
from rewriter.rules.blocks.contents import By, Dense, Factor, Features, Linear, Output, Router, Weight
from rewriter.rules.blocks.mixing import Chosen
from rewriter.tensors import stacked


def router_of(facts: Facts, parts: list[Located]) -> Router | None:
    """Returns the router whose groups the parts are, where it is one."""
    sizes = {
        symbol[0]
        for part in parts
        for atom in part.axes[0]
        for symbol in atom.size.symbols
        if not isinstance(symbol, str)
    }
    if len(sizes) != 1:
        return None
    located = facts.get(sizes.pop(), Located)
    return located.content.router if located is not None and isinstance(located.content, Chosen) else None


def joined(parts: Sequence[Content], by: By) -> Content | None:
    """One content of all experts, ``by`` saying which of them it is of, out of one for each."""
    first = parts[0]
    if isinstance(first, Features):
        features = [part for part in parts if isinstance(part, Features)]
        plain = [f.factors[0] for f in features if len(f.factors) == 1 and not f.factors[0].steps]
        linear = _joined_linears([factor.linear for factor in plain], by) if len(plain) == len(parts) else None
        return None if linear is None else Features((Factor(linear),))
    outputs = [part for part in parts if isinstance(part, Output)]
    return _joined_outputs(outputs, by) if len(outputs) == len(parts) else None


def _joined_outputs(outputs: list[Output], by: By) -> Output | None:
    first = outputs[0]
    if any(o.activation != first.activation or (o.up is None) != (first.up is None) for o in outputs):
        return None
    ups = [o.up for o in outputs if o.up is not None]
    gate = _joined_linears([o.gate for o in outputs], by)
    up = _joined_linears(ups, by) if ups else None
    down = _stack([o.down for o in outputs])
    biases = [o.bias for o in outputs if o.bias is not None]
    if gate is None or (up is None) != (not ups) or down is None or len(biases) not in (0, len(outputs)):
        return None
    return dataclasses.replace(first, gate=gate, up=up, down=down, bias=stacked(biases) if biases else None)


def _joined_linears(linears: list[Linear], by: By) -> Linear | None:
    first = linears[0]
    weight = _stack([linear.weight for linear in linears])
    alike = all(linear.x is first.x and linear.by == "one" for linear in linears)
    biases = [linear.bias for linear in linears if linear.bias is not None]
    if weight is None or not alike or len(biases) not in (0, len(linears)):
        return None
    return Linear(first.x, weight, stacked(biases) if biases else None, by)


def _stack(weights: Sequence[Weight]) -> Dense | None:
    views = [weight.view for weight in weights if isinstance(weight, Dense)]
    same = len(views) == len(weights) and len({(v.shape, v.dtype) for v in views}) == 1
    return Dense(stacked(views)) if same else None
