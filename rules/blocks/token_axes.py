"""Which token indices lie along the dimensions of a value, in the order in which they were flattened."""

from __future__ import annotations

import contextlib

import onnx_ir as ir

from rewriter.facts import Facts
from rewriter.facts.shapes import shape_of
from rewriter.graph.walk import GaveUp, producers, walk
from rewriter.rules.blocks.axes import Axes, reshape, tokens

_NEAR = 64


def token_axes(facts: Facts, value: ir.Value) -> Axes | None:
    """Returns the token indices of all dimensions of a value but the last; None where its shape is not known.

    An extent is a product, and does not tell the order of two unknown extents in one dimension: that is the order of
    the dimensions that were flattened.
    """
    dims = shape_of(facts, value)
    if not dims:
        return None
    lead = dims[:-1]
    plain = tokens(lead)
    if all(len(dim) <= 1 for dim in plain):
        return plain

    def before(at: ir.Value) -> list[ir.Value]:
        found = ((given, shape_of(facts, given)) for given in producers(at))
        return [given for given, own in found if own and own[: len(lead)] == lead and len(own) > len(lead)]

    with contextlib.suppress(GaveUp):
        for at in walk([value], before, limit=_NEAR):
            given = shape_of(facts, producers(at)[0]) if producers(at) else None
            apart = tokens(given[:-1]) if given else ()
            if len(apart) > len(lead) and all(len(dim) <= 1 for dim in apart) and (own := reshape(apart, lead)):
                return own
    return plain
