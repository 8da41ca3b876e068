"""Activations: elementwise functions of linears and their products, and which of them com.microsoft::MoE has.

Facts stated: ``Located`` with content ``Features``. A product keeps its factors, so that silu, a gate and a clamp are
the same however they are multiplied out; what the product is, is asked once, where the next linear reads it.
Source: Sigmoid and Mul, Clip, Gelu, Relu, com.microsoft QuickGelu and FastGelu; gpt-oss' clamped SwiGLU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from rewriter.facts import Facts, Recogniser
from rewriter.rule import Declined
from rewriter.tensors import View
from rules._guards import float_attribute, text_attribute
from rules.recognise.axes import Content, Located
from rules.recognise.contents import Activation, Factor, Features, Linear, Output, Step

_UNARY = ("Sigmoid", "Relu", "Gelu", "Tanh", "Erf", "Softplus", "HardSigmoid", "HardSwish", "Elu", "LeakyRelu", "Mish")


def as_features(held: Content | None) -> Features | None:
    """Returns a content as features; a linear of a linear is a linear of what lies between them."""
    if isinstance(held, Features):
        return held
    if isinstance(held, Output) and held.activation.kind == "identity" and held.inner is not None:
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
    return None if first is None or second is None else Features((*first.factors, *second.factors))


def with_number(op_type: str, held: Content, number: float) -> Features | None:
    """Returns the features after an elementwise operator with one number."""
    if op_type in ("Min", "Max"):
        return then(held, ("clip", *((-math.inf, number) if op_type == "Min" else (number, math.inf))))
    if op_type == "Sub":
        return then(held, ("add", -number))
    if op_type == "Div":
        return then(held, ("scale", 1 / number)) if number else None
    return then(held, ("add" if op_type == "Add" else "scale", number))


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
                    raise Declined("a bound of Clip is not constant", node)
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


_PLAIN: dict[tuple[Step, ...], Activation] = {
    (): Activation("identity"),
    (("relu",),): Activation("relu"),
    (("clip", 0.0, math.inf),): Activation("relu"),
    (("gelu",),): Activation("gelu"),
}


Found = tuple[Activation, Linear, Linear | None]
"""An activation, the linear that is activated, and the one that multiplies it."""


def classify(features: Features, node: ir.Node) -> Found:
    """Returns which activation a product of features is, the linear that is activated, and the one that multiplies it.

    Args:
        features: what a down projection reads.
        node: the down projection, for the reason.

    Raises:
        Declined: com.microsoft::MoE has no such activation.
    """
    factors = [_simple(factor) for factor in features.factors]
    gated = _swish(factors)
    if gated is None:
        if found := _plain(factors) or _geglu(factors):
            return found
        raise Declined(f"MoE has no activation {describe(features)}", node)
    gate, alpha, others = gated
    limit = _limit(gate.steps)
    if not others and gate.steps == () and alpha == 1:
        return Activation("silu"), gate.linear, None
    if len(others) == 1 and limit is not None and others[0].linear.x is gate.linear.x:
        up = others[0]
        clipped, beta = _clipped(up.steps, limit)
        if clipped:
            return Activation("swiglu", alpha, beta, None if math.isinf(limit) else limit), gate.linear, up.linear
    raise Declined(f"MoE has no activation {describe(features)}", node)


def _plain(factors: Sequence[Factor]) -> Found | None:
    """A function of one linear, or the square of relu."""
    kind = _PLAIN.get(factors[0].steps)
    if kind is not None and len(factors) == 1:
        return kind, factors[0].linear, None
    if kind == Activation("relu") and len(factors) == 2 and factors[0] == factors[1]:
        return Activation("relu2"), factors[0].linear, None
    return None


def _geglu(factors: Sequence[Factor]) -> Found | None:
    """The tanh form of gelu of one linear times another of the same tokens."""
    if len(factors) != 2:
        return None
    for gate, up in (factors, factors[::-1]):
        if gate.steps == (("gelu",),) and not up.steps and up.linear.x is gate.linear.x:
            return Activation("geglu"), gate.linear, up.linear
    return None


def _simple(factor: Factor) -> Factor:
    """The factor without functions that change nothing."""
    idle: Sequence[Step] = (("clip", -math.inf, math.inf), ("add", 0.0), ("scale", 1.0))
    return Factor(factor.linear, tuple(step for step in factor.steps if step not in idle))


def _swish(factors: list[Factor]) -> tuple[Factor, float, list[Factor]] | None:
    """Finds ``g * sigmoid(alpha * g)`` among the factors: g, alpha and the other factors."""
    for i, sigmoid in enumerate(factors):
        if not sigmoid.steps or sigmoid.steps[-1] != ("sigmoid",):
            continue
        inner, alpha = sigmoid.steps[:-1], 1.0
        if inner and inner[-1][0] == "scale":
            inner, alpha = inner[:-1], float(inner[-1][1])
        gate = Factor(sigmoid.linear, inner)
        rest = factors[:i] + factors[i + 1 :]
        if gate in rest:
            rest.remove(gate)
            return gate, alpha, rest
    return None


def _limit(steps: tuple[Step, ...]) -> float | None:
    """The upper bound of a gate, infinite for none; None for any other function."""
    if not steps:
        return math.inf
    if len(steps) != 1 or steps[0][:2] != ("clip", -math.inf):
        return None
    limit = float(steps[0][2])
    return limit if limit >= 0 else None  # the kernels abort the process at a negative one


def _clipped(steps: tuple[Step, ...], limit: float) -> tuple[bool, float]:
    """Whether the steps bound to plus and minus ``limit`` and add a number at most; that number."""
    rest = steps if math.isinf(limit) else steps[1:]
    if not math.isinf(limit) and (not steps or steps[0] != ("clip", -limit, limit)):
        return False, 0.0
    if not rest:
        return True, 0.0
    return (True, float(rest[0][1])) if len(rest) == 1 and rest[0][0] == "add" else (False, 0.0)


def describe(features: Features) -> str:
    """Returns a product of features as people write it."""
    names: dict[int, str] = {}
    parts = []
    for factor in features.factors:
        text = names.setdefault(id(factor.linear), f"linear{len(names) + 1}" if names else "linear")
        for step in factor.steps:
            text = f"{step[0]}({', '.join((text, *(f'{n:g}' for n in step[1:] if not isinstance(n, str))))})"
        parts.append(text)
    return " * ".join(parts)


RECOGNISERS: tuple[Recogniser, ...] = (
    *(Unary(name) for name in (*_UNARY, "Swish")),
    *(Unary(name, "com.microsoft") for name in ("QuickGelu", "FastGelu")),
    Clip(),
)
