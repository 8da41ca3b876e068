"""Division by powers of two -> multiplication by their reciprocals, which are exact.

Matched:      Div(x, c), c a constant
Replacement:  Mul(x, 1/c)
Declines when:
              the reciprocal of an element of c is rounded: it is no power of two, or too large or small
              c holds more than max_elements
Source:       Granite's logits_scaling, attention scales; every exporter
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.facts import Facts
from rewriter.rule import Declined, NotApplicable, Rule
from rewriter.tensors import View


class DivToMul(Rule):
    """The rule at a Div."""

    def __init__(self, max_elements: int) -> None:
        super().__init__(name="div-to-mul")
        self._max_elements = max_elements

    def pattern(self, op: Any, x: Any, c: Any) -> Any:
        return op.Div(x, c)

    def rewrite(self, op: Any, *, x: ir.Value, c: ir.Value) -> Any:
        factor = reciprocal(self.run.facts, c, self._max_elements)
        return op.Mul(x, op.initializer(ir.tensor(factor, name=f"{c.name}_reciprocal")))


def reciprocal(facts: Facts, c: ir.Value, max_elements: int) -> npt.NDArray[Any]:
    """Returns 1/c, element by element, or declines."""
    view = facts.get(c, View)
    if view is None or not view.dtype.is_floating_point():
        raise NotApplicable
    if view.size > max_elements:
        raise Declined(f"the divisor holds {view.size} numbers, more than max_elements ({max_elements})", c)
    divisor = view.numpy()
    with np.errstate(all="ignore"):
        factor = np.reciprocal(divisor)
    exact = (np.abs(np.frexp(divisor)[0]) == 0.5) & np.isfinite(factor)
    if not exact.all():
        raise Declined(f"1/{divisor[~exact][0]:g} is rounded", c)
    return factor


def rule(*, max_elements: int = 4096) -> Rule:
    """Builds the rule.

    Args:
        max_elements: a constant with more elements stays a divisor.
    """
    return DivToMul(max_elements)
