"""The old place of ``rewriter.operators``' experts, for rule packages; it goes with the next release."""

import warnings

from rewriter.operators import form as _form
from rewriter.operators.activation import ACTIVATIONS as _ACTIVATIONS
from rewriter.operators.form import PROJECTIONS, ExpertForm, form_of, is_experts  # noqa: F401
from rewriter.operators.operator import input_at  # noqa: F401
from rewriter.operators.qmoe import ROUTER_WEIGHTS, Quantized, quantized_of  # noqa: F401

GLU = tuple(activation.name for activation in _ACTIVATIONS if activation.gated)
OPERATORS = tuple(operator.name for operator in _form.OPERATORS)
_PARTS = ("weight", "scales", "bias", "zero_points")
SLOTS = {
    operator.name: {
        part: tuple(getattr(slots, part) for slots in operator.projections)
        for part in _PARTS
        if getattr(operator.projections[0], part) is not None
    }
    for operator in _form.OPERATORS
}

warnings.warn("rewriter.experts is rewriter.operators.form now", DeprecationWarning, stacklevel=2)
