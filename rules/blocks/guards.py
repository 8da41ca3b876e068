"""Guards: each returns what it has proved, or declines with the reason and the value at fault."""

from __future__ import annotations

import onnx_ir as ir

from rewriter.facts import Facts
from rewriter.graph.declines import CONSTANT, INFER_SHAPES, ONE_FLOAT_TYPE
from rewriter.rule import Declined
from rewriter.tensors import View

FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


def require_constant(facts: Facts, value: ir.Value, what: str) -> View:
    """Returns the view that ``value`` is, or declines: it is not constant."""
    view = facts.get(value, View)
    if view is None:
        why = facts.why_not(value)
        raise Declined(f"{what} is not constant{f': {why}' if why else ''}", value, remedy=why.remedy or CONSTANT)
    return view


def require_float(value: ir.Value) -> ir.DataType:
    """Returns the element type of an operator's input, or declines: it is unknown or none of ``FLOATS``."""
    if value.dtype is None:
        raise Declined("the element type of the input is unknown", value, remedy=INFER_SHAPES)
    if value.dtype not in FLOATS:
        names = ", ".join(sorted(d.name for d in FLOATS))
        raise Declined(f"the input is {value.dtype.name}; the operator takes {names}", value, remedy=ONE_FLOAT_TYPE)
    return value.dtype
