"""Activations: elementwise functions of linears and their products.

Facts stated: ``Located`` with content ``Features``. A product keeps its factors, so that silu, a gate and a clamp are
the same however they are multiplied out; what the product is, ``classify`` asks once, where the next linear reads it.
Source: Sigmoid and Mul, Clip, Gelu, Relu, com.microsoft QuickGelu and FastGelu; gpt-oss' clamped SwiGLU.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import onnx_ir as ir

from rewriter.facts import Facts, Recogniser
from rewriter.graph.declines import CONSTANT
from rewriter.operators.activation import IDENTITY, Step
from rewriter.rule import Declined
from rewriter.rules.blocks.axes import Content, Located
from rewriter.rules.blocks.contents import Factor, Features, Linear, Output
from rewriter.rules.blocks.guards import float_attribute, text_attribute
from rewriter.tensors import View

_UNARY = ("Sigmoid", "Relu", "Gelu", "Tanh", "Erf", "Softplus", "HardSigmoid", "HardSwish", "Elu", "LeakyRelu", "Mish")


def as_features(held: Content | None) -> Features | None:
    """Returns a content as features; a linear of a linear is a linear of what lies between them."""
    if isinstance(held, Features):
        return held
    if isinstance(held, Output) and held.activation.kind is IDENTITY and held.inner is not None:
        return Features((Factor(Linear(held.inner, held.down, held.bias, held.by)),))
    return None


def then(held: Content | None, step: Step) -> Features | None:
    """Returns the features after one more elementwise function; None where they are a product already."""
    features = as_features(held)
    if features is None or len(features.factors) != 1:
        return None
    factor = features.factors[0]
    steps = factor.steps
    if steps and step[0] == steps[-1][0] == "clip":
        (_, low, high), (_, lowest, highest) = steps[-1], step
        low, high = (min(max(float(b), float(lowest)), float(highest)) for b in (low, high))
        steps, step = steps[:-1], ("clip", low, high)
    return Features((Factor(factor.linear, (*steps, step)),))


def product(a: Content, b: Content) -> Features | None:
    """Returns the product of features."""
    first, second = as_features(a), as_features(b)
    if first is None or second is None:
        return None
    return Features((*first.factors, *second.factors), first.scale * second.scale)


def power(a: Content, exponent: float) -> Features | None:
    """Returns features squared or cubed."""
    square = product(a, a) if exponent in (2, 3) else None
    return square if square is None or exponent == 2 else product(square, a)


def summed(a: Content, b: Content) -> Features | None:
    """Returns ``x + number * x^3``, the inner function of gelu's tanh form; None for any other sum."""
    x, cube = as_features(a), as_features(b)
    if x is None or cube is None or len(x.factors) != 1 or cube.factors != x.factors * 3:
        return None
    return then(x, ("cubic", cube.scale))


def times(held: Content, number: float) -> Features | None:
    """Returns features times a number."""
    features = as_features(held)
    if features is None or len(features.factors) == 1:
        return then(held, ("scale", number))
    return dataclasses.replace(features, scale=features.scale * number)


def with_number(op_type: str, held: Content, number: float) -> Features | None:
    """Returns the features after an elementwise operator with one number."""
    if op_type in ("Min", "Max"):
        return then(held, ("clip", *((-math.inf, number) if op_type == "Min" else (number, math.inf))))
    if op_type == "Sub":
        return then(held, ("add", -number))
    if op_type == "Div":
        return times(held, 1 / number) if number else None
    return then(held, ("add", number)) if op_type == "Add" else times(held, number)


class Unary(Recogniser):
    """An elementwise function without constants."""

    def __init__(self, op_type: str, domain: str = "") -> None:
        super().__init__(name=op_type)
        self._op_type = op_type
        self._domain = domain

    def pattern(self, op: Any, x: Any) -> Any:
        where = {"_domain": self._domain} if self._domain else {}
        return getattr(op, self._op_type)(x, _outputs=["out"], **where)

    def recognise(self, facts: Facts, *, x: ir.Value, out: ir.Value) -> Located | None:
        located = facts.get(x, Located)
        node = out.producer()
        features = None if located is None or node is None else as_features(located.content)
        if features is None or located is None or node is None:
            return None
        held = self._swish(features, node) if self._op_type in ("QuickGelu", "Swish") else then(features, _step(node))
        return None if held is None else Located(held, located.axes)

    def _swish(self, features: Features, node: ir.Node) -> Features | None:
        """``x * Sigmoid(alpha * x)``."""
        alpha = float_attribute(node, "alpha", 1.702 if self._op_type == "QuickGelu" else 1.0)
        scaled = features if alpha == 1 else then(features, ("scale", alpha))
        gate = then(scaled, ("sigmoid",))
        return None if gate is None else product(features, gate)


def _step(node: ir.Node) -> Step:
    if node.op_type == "FastGelu" or (node.op_type == "Gelu" and text_attribute(node, "approximate", "none") == "tanh"):
        return ("gelu",)
    return (node.op_type.lower() if node.op_type != "Gelu" else "Gelu(erf)",)


class Clip(Recogniser):
    """Constant bounds, as inputs or (before opset 11) as attributes."""

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Clip(x, _allow_other_inputs=True, _outputs=["out"])

    def recognise(self, facts: Facts, *, x: ir.Value, out: ir.Value) -> Located | None:
        located = facts.get(x, Located)
        node = out.producer()
        if located is None or node is None or as_features(located.content) is None:
            return None
        bounds = []
        for position, name, default in ((1, "min", -math.inf), (2, "max", math.inf)):
            bound = float_attribute(node, name, default)
            if position < len(node.inputs) and node.inputs[position] is not None:
                given = number_of(facts, node.inputs[position])
                if given is None:
                    raise Declined("a bound of Clip is not constant", node, remedy=CONSTANT)
                bound = given
            bounds.append(bound)
        held = then(located.content, ("clip", *bounds))
        return None if held is None else Located(held, located.axes)


def number_of(facts: Facts, value: ir.Value | None) -> float | None:
    """Returns the one number that a constant holds."""
    view = facts.get(value, View)
    if view is None or view.size != 1 or view.dtype in (ir.DataType.STRING, ir.DataType.BOOL):
        return None
    return float(np.asarray(view.numpy()).reshape(-1)[0])


RECOGNISERS: tuple[Recogniser, ...] = (
    *(Unary(name) for name in (*_UNARY, "Swish")),
    *(Unary(name, "com.microsoft") for name in ("QuickGelu", "FastGelu")),
    Clip(),
)
