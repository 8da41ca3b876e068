"""Facts of values: who gives them, who else reads them, and whether they are rounded on the way."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import onnx_ir as ir

from rewriter.testing.change.bodies import Bodies, Constant, Place

_OTHER_WIDTH = {ir.DataType.FLOAT: ir.DataType.FLOAT16, ir.DataType.FLOAT16: ir.DataType.FLOAT}


def constant_overridable(bodies: Bodies) -> Iterator[Place]:
    """A constant is a default that the caller may override."""
    for constant in _fed_safely(bodies):
        what = f"constant '{constant.name}': also a graph input, so that a caller may override it"
        yield Place(what, partial(bodies.feed, constant, default=True))


def constant_given(bodies: Bodies) -> Iterator[Place]:
    """A constant is an input of the model."""
    for constant in _fed_safely(bodies):
        yield Place(f"constant '{constant.name}': a graph input", partial(bodies.feed, constant, default=False))


def value_is_output(bodies: Bodies) -> Iterator[Place]:
    """An intermediate value is an output of the model too."""
    for value in _intermediate(bodies):
        yield Place(f"value '{value.name}': also a graph output", partial(bodies.expose, value))


def second_reader(bodies: Bodies) -> Iterator[Place]:
    """An intermediate value has another reader."""
    for value in _intermediate(bodies):
        yield Place(f"value '{value.name}': another reader", partial(_read_again, bodies, value))


def value_rounded(bodies: Bodies) -> Iterator[Place]:
    """An intermediate value takes another element type on the way to its readers."""
    for value in _intermediate(bodies):
        width = None if value.dtype is None else _OTHER_WIDTH.get(value.dtype)
        if width is not None:
            yield Place(f"value '{value.name}': cast to {width} and back", partial(_round, bodies, value, width))


def _intermediate(bodies: Bodies) -> Iterator[ir.Value]:
    """What nodes compute that is no output yet, and constants of the main graph, which may be outputs as well."""
    for node in bodies.nodes:
        if node.op_type != "Constant":
            yield from (v for v in node.outputs if v.name and not v.is_graph_output())
    for constant in bodies.constants:
        if constant.value.graph is bodies.model.graph and not constant.value.is_graph_output():
            yield constant.value


def _fed_safely(bodies: Bodies) -> Iterator[Constant]:
    """Constants that are no outputs themselves: an output of a body is computed there."""
    return (c for c in bodies.constants if not c.value.is_graph_output())


def _read_again(bodies: Bodies, value: ir.Value) -> None:
    bodies.expose(bodies.read(value, "Neg"))


def _round(bodies: Bodies, value: ir.Value, width: ir.DataType) -> None:
    uses, dtype = list(value.uses()), value.dtype
    assert dtype is not None
    back = bodies.read(bodies.read(value, "Cast", to=width.value), "Cast", to=dtype.value)
    for node, index in uses:
        node.replace_input_with(index, back)
