"""Which activation of com.microsoft::MoE a product of elementwise functions is.

Source: the operator's schema; gpt-oss' clamped SwiGLU; gelu's tanh form as torch.onnx writes it before opset 20.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir

from rewriter.graph.declines import OTHER_FUNCTION
from rewriter.operators.activation import ACTIVATIONS, SILU, SWIGLU, Step
from rewriter.rule import Declined
from rewriter.rules.blocks.contents import Activated, Factor, Features, Linear

Found = tuple[Activated, Linear, Linear | None]
"""An activation, the linear that is activated, and the one that multiplies it."""


def classify(features: Features, node: ir.Node) -> Found:
    """Returns which activation a product of features is, the linear that is activated, and the one that multiplies it.

    Args:
        features: what a down projection reads.
        node: the down projection, for the reason.

    Raises:
        Declined: com.microsoft::MoE has no such activation.
    """
    factors, scale = _without_gelu([_simple(factor) for factor in features.factors], features.scale)
    gated = _swish(factors) if scale == 1 else None
    if gated is None:
        found = _spelled(factors) if scale == 1 else None
        if found is not None:
            return found
        raise Declined(f"MoE has no activation {describe(features)}", node, remedy=OTHER_FUNCTION)
    gate, alpha, others = gated
    limit = _limit(gate.steps)
    if not others and gate.steps == () and alpha == 1:
        return Activated(SILU), gate.linear, None
    if len(others) == 1 and limit is not None and others[0].linear.x is gate.linear.x:
        up = others[0]
        clipped, beta = _clipped(up.steps, limit)
        if clipped:
            return Activated(SWIGLU, alpha, beta, None if math.isinf(limit) else limit), gate.linear, up.linear
    raise Declined(f"MoE has no activation {describe(features)}", node, remedy=OTHER_FUNCTION)


def _spelled(factors: Sequence[Factor]) -> Found | None:
    """A function of one linear, to a power, or times another linear of the same tokens: as the records spell them."""
    first = factors[0]
    for known in ACTIVATIONS:
        if known.gated:
            for gate, up in (factors, factors[::-1]) if len(factors) == 2 else ():
                if gate.steps in known.spellings and not up.steps and up.linear.x is gate.linear.x:
                    return Activated(known), gate.linear, up.linear
        elif first.steps in known.spellings and list(factors) == [first] * known.power:
            return Activated(known), first.linear, None
    return None


def _simple(factor: Factor) -> Factor:
    """The factor without functions that change nothing."""
    idle: Sequence[Step] = (("clip", -math.inf, math.inf), ("add", 0.0), ("scale", 1.0))
    return Factor(factor.linear, tuple(step for step in factor.steps if step not in idle))


_CUBIC, _INNER = 0.044715, math.sqrt(2 / math.pi)


def _without_gelu(factors: list[Factor], scale: float) -> tuple[list[Factor], float]:
    """Writes ``0.5 * g * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 * g^3)))`` as gelu of g, wherever the 0.5 stands."""
    for i, outer in enumerate(factors):
        steps, half = _split_scale(outer.steps)
        inner, (cubic, factor) = steps[:-4], (_number(steps, -4, "cubic"), _number(steps, -3, "scale"))
        if steps[-2:] != (("tanh",), ("add", 1.0)) or not (_is(cubic, _CUBIC) and _is(factor, _INNER)):
            continue
        rest = factors[:i] + factors[i + 1 :]
        for other in rest:
            own, more = _split_scale(other.steps)
            if (other.linear, own) == (outer.linear, inner):
                rest.remove(other)
                return [*rest, Factor(outer.linear, (*inner, ("gelu",)))], 2 * scale * half * more
    return factors, scale


def _split_scale(steps: tuple[Step, ...]) -> tuple[tuple[Step, ...], float]:
    return (steps[:-1], float(steps[-1][1])) if steps and steps[-1][0] == "scale" else (steps, 1.0)


def _number(steps: tuple[Step, ...], position: int, name: str) -> float:
    """The constant of the function at a position, where it is this one; else NaN."""
    step = steps[position] if len(steps) >= -position else ("",)
    return float(step[1]) if step[0] == name else math.nan


def _is(number: float, exact: float) -> bool:
    """Whether a number is this one, as some float type holds it."""
    halves = (float(half(exact)) for half in (np.float16, ml_dtypes.bfloat16))
    return math.isclose(number, exact, rel_tol=1e-6) or number in halves


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
    if _is_erf(parts):
        return "gelu in its exact form (erf); what there is is its tanh form"
    return " * ".join(parts if features.scale == 1 else (f"{features.scale:g}", *parts))


def _is_erf(parts: Sequence[str]) -> bool:
    """Whether a product, as it is described, is linear * (1 + erf(linear / sqrt(2))) / 2."""
    inner = "add(erf(scale(linear, 0.707107)), 1)"
    return "linear" in parts and len(parts) == 2 and any(inner in part for part in parts)
