"""Activations: elementwise functions of linears and their products.

Facts stated: ``Located`` with content ``Features``. A product keeps its factors, so that silu, a gate and a clamp are
the same however they are multiplied out; what the product is, ``classify`` asks once, where the next linear reads it.
Source: Sigmoid and Mul, Clip, Gelu, Relu, com.microsoft QuickGelu and FastGelu; gpt-oss' clamped SwiGLU.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import onnx_ir as ir

from rewriter.facts import Facts, Family
from rewriter.graph.attributes import float_attribute, text_attribute
from rewriter.graph.declines import CONSTANT, MERGED
from rewriter.operators.activation import IDENTITY, Step
from rewriter.rule import Declined
from rewriter.rules.blocks.axes import Content, Located, Uniform
from rewriter.rules.blocks.contents import Factor, Features, Linear, Output
from rewriter.rules.blocks.laws import of_number, of_two
from rewriter.tensors import View

activations = Family("activations")

_MOST = 32
"""Functions one after the other, and factors, that are kept: no activation has as many, and a product may be squared at
every node."""

_UNARY = (
    *("Sigmoid", "Relu", "Gelu", "Tanh", "Erf", "Softplus", "HardSigmoid", "HardSwish", "Elu", "LeakyRelu", "Mish"),
    "Exp",
)


def as_features(held: Content | None) -> Features | None:
    """Returns a content as features; a linear of a linear is a linear of what lies between them."""
    if isinstance(held, Features):
        return held
    if (
        isinstance(held, Output)
        and held.activation.kind is IDENTITY
        and held.inner is not None
        and held.gate.share is None
    ):
        return Features((Factor(Linear(held.inner, held.down, held.bias, held.by)),))
    return None


def is_plain_linear(held: Content | None) -> bool:
    """Whether a content is one linear, of no expert among others, and nothing more: it may be tokens itself."""
    features = as_features(held)
    factor = features.factors[0] if features is not None and len(features.factors) == 1 else None
    return factor is not None and not factor.steps and factor.linear.by == "one" and factor.linear.share is None


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
    if len(steps) == _MOST:
        return None
    return Features((Factor(factor.linear, (*steps, step)),))


@of_two.at("Mul")
def multiply(a: Located, b: Located, node: ir.Node) -> Features | None:
    """Returns the product of features."""
    return product(a.content, b.content)


def product(a: Content, b: Content) -> Features | None:
    """Returns the product of features."""
    first, second = as_features(a), as_features(b)
    if first is None or second is None or len(first.factors) + len(second.factors) > _MOST:
        return None
    return Features((*first.factors, *second.factors), first.scale * second.scale)


@of_number.at("Pow")
def power(a: Located, exponent: float, node: ir.Node) -> Features | None:
    """Returns features squared or cubed."""
    held = a.content
    square = product(held, held) if exponent in (2, 3) else None
    return square if square is None or exponent == 2 else product(square, held)


@of_two.at("Add")
def add_cube(a: Located, b: Located, node: ir.Node) -> Features | None:
    """Returns ``x + number * x^3``, the inner function of gelu's tanh form; None for any other sum."""
    x, cube = as_features(a.content), as_features(b.content)
    if x is None or cube is None or len(x.factors) != 1 or cube.factors != x.factors * 3:
        return None
    return then(x, ("cubic", cube.scale))


@of_two.at("Add")
def add_adapter(a: Located, b: Located, node: ir.Node) -> Features | None:
    """Declines where a linear of a linear of the same tokens is added to one: no operator has such a sum."""
    held, low = as_features(a.content), as_features(b.content)
    if held is None or low is None or len(held.factors) != 1 or len(low.factors) != 1:
        return None
    first = low.factors[0].linear.x.producer()
    if first is not None and first.op_type in ("MatMul", "Gemm") and first.inputs[0] is held.factors[0].linear.x:
        raise Declined("two more linears are added to a linear, as LoRA adapters are", node, remedy=MERGED)
    return None


def times(held: Content, number: float) -> Features | None:
    """Returns features times a number."""
    features = as_features(held)
    if features is None or len(features.factors) == 1:
        return then(held, ("scale", number))
    return dataclasses.replace(features, scale=features.scale * number)


@of_number.at("Mul", "Add", "Div", "Sub", "Min", "Max")
def with_number(a: Located, number: float, node: ir.Node) -> Features | Output | None:
    """Returns the features after an elementwise operator with one number; times 1 or plus 0 it leaves them."""
    held, op_type = a.content, node.op_type
    if (op_type in ("Mul", "Div") and number == 1) or (op_type in ("Add", "Sub") and not number):
        return held if isinstance(held, Features | Output) else None
    if op_type in ("Min", "Max"):
        return then(held, ("clip", *((-math.inf, number) if op_type == "Min" else (number, math.inf))))
    if op_type == "Sub":
        return then(held, ("add", -number))
    if op_type == "Div":
        return times(held, 1 / number) if number else None
    return then(held, ("add", number)) if op_type == "Add" else times(held, number)


@activations.at(*_UNARY)
@activations.at("FastGelu", domain="com.microsoft")
def unary(facts: Facts, node: ir.Node, x: ir.Value) -> Located | None:
    """An elementwise function without constants."""
    return _after(facts, x, lambda features: then(features, _step(node)))


@activations.at("Reciprocal", "Div")
def inverse(facts: Facts, node: ir.Node, x: ir.Value, divisor: ir.Value | None = None) -> Located | None:
    """``1 / (1 + exp(-x))`` is a sigmoid, as exporters write it that know only arithmetic."""
    if divisor is not None and number_of(facts, x) != 1:
        return None
    return _after(facts, divisor or x, _inverse)


@of_two.at("Div")
def over_inverse(a: Located, b: Located, node: ir.Node) -> Features | None:
    """``x / (1 + exp(-x))`` is x times a sigmoid."""
    below = as_features(b.content)
    inverse = None if below is None else _inverse(below)
    return None if inverse is None else product(a.content, inverse)


def _inverse(features: Features) -> Features | None:
    """Returns one over features that are the inverse of a sigmoid."""
    factor, *others = features.factors
    if others or factor.steps[-3:] != (("scale", -1.0), ("exp",), ("add", 1.0)):
        return None
    return Features((Factor(factor.linear, (*factor.steps[:-3], ("sigmoid",))),))


@activations.at("Neg")
def negated(facts: Facts, node: ir.Node, x: ir.Value) -> Located | None:
    """``-x`` is x times -1."""
    return _after(facts, x, lambda features: times(features, -1.0))


@activations.at("Swish")
@activations.at("QuickGelu", domain="com.microsoft")
def swish(facts: Facts, node: ir.Node, x: ir.Value) -> Located | None:
    """``x * Sigmoid(alpha * x)``."""
    alpha = float_attribute(node, "alpha", 1.702 if node.op_type == "QuickGelu" else 1.0)

    def gated(features: Features) -> Features | None:
        gate = then(features if alpha == 1 else then(features, ("scale", alpha)), ("sigmoid",))
        return None if gate is None else product(features, gate)

    return _after(facts, x, gated)


def _after(facts: Facts, x: ir.Value, function: Callable[[Features], Features | None]) -> Located | None:
    located = facts.get(x, Located)
    features = None if located is None else as_features(located.content)
    held = None if features is None else function(features)
    return None if located is None or held is None else Located(held, located.axes)


def _step(node: ir.Node) -> Step:
    if node.op_type == "FastGelu" or (node.op_type == "Gelu" and text_attribute(node, "approximate", "none") == "tanh"):
        return ("gelu",)
    return (node.op_type.lower() if node.op_type != "Gelu" else "Gelu(erf)",)


@activations.at("Clip")
def clip(facts: Facts, node: ir.Node, x: ir.Value, *others: ir.Value | None) -> Located | None:
    """Constant bounds, as inputs or (before opset 11) as attributes."""
    located = facts.get(x, Located)
    if located is None or as_features(located.content) is None:
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
    """Returns the one number that a constant holds, or what is known to be one."""
    view, located = facts.get(value, View), facts.get(value, Located)
    if located is not None and isinstance(located.content, Uniform) and not any(located.axes):
        return located.content.value
    if view is None or view.size != 1 or view.dtype in (ir.DataType.STRING, ir.DataType.BOOL):
        return None
    return view.number
