"""What every strategy does last: it puts its body somewhere and closes the model."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from hypothesis import strategies as st

from rewriter.testing.draw.graph import Scope, floats
from rewriter.testing.draw.placements import Body, finish, outer_shape, place

OPSETS = (21, 18, 13, 11)
MODERN = OPSETS[:3]
"""Those in which axes and lengths are inputs."""


def draw_model(
    draw: st.DrawFn,
    scope: Scope,
    body: Body,
    dtype: str,
    shape: Sequence[int | str],
    features: int,
    *,
    placements: Sequence[str],
    typed: bool | None,
    named: bool | None = None,
    weight: str = "",
    obstacle: str = "",
) -> ir.Model:
    """Draws where a body stands, and returns the model.

    Args:
        draw: of the strategy.
        scope: an empty main graph.
        body: what the model computes of its input ``x``.
        dtype: of input and output.
        shape: of the input.
        features: last dimension of the body's output, whose others are those of the input.
        placements: of ``PLACEMENTS``.
        typed: whether values carry types and shapes; None draws that.
        named: whether nodes have names; None draws that.
        weight: the constant that an obstacle is about, where it is one of the main graph.
        obstacle: one that ends in ``-is-input`` or ``-is-output`` makes the weight that.
    """
    placement = draw(st.sampled_from(placements))
    scope.inputs["x"] = floats("x", dtype, shape)
    output = place(body, placement, dtype, captures=draw(st.booleans()))(scope, "x")
    found = weight in scope.initializers
    if found and obstacle.endswith("-is-output"):
        scope.expose_constant(weight)
    return finish(
        scope,
        output,
        dtype,
        [*outer_shape(placement), *shape[:-1], features],
        overridable=(weight,) if found and obstacle.endswith("-is-input") else (),
        typed=draw(st.sampled_from((True, True, True, False))) if typed is None else typed,
        named=draw(st.booleans()) if named is None else named,
    )
