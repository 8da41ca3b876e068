"""Strategies that draw small readable Mixture-of-Experts graphs, for properties of rules.

Each draws an ``onnx_ir.Model`` of a few nodes, whose input is ``x`` [T, K], and shrinks towards the plainest one: one
expert, one Gather, one MatMul, in the main graph.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument

from rewriter.errors import nearest
from rewriter.testing import _drawn
from rewriter.testing._blocks import ROUTERS
from rewriter.testing._consumers import CONSUMERS
from rewriter.testing._drawn import HINDRANCES, NAMES, OBSTACLES
from rewriter.testing._graph import FLOAT_TYPES
from rewriter.testing._placements import PLACEMENTS
from rewriter.testing._spellings import SELECTIONS

DTYPES = tuple(FLOAT_TYPES)


def unrolled_experts(
    *,
    max_experts: int = 5,
    max_size: int = 40,
    dtypes: Collection[str] = DTYPES,
    placements: Collection[str] = PLACEMENTS,
    selections: Collection[str] = SELECTIONS,
    consumers: Collection[str] = CONSUMERS,
    obstacles: Collection[str] = OBSTACLES,
    names: Collection[str] = NAMES,
    typed: bool | None = None,
    repeats: bool = True,
) -> st.SearchStrategy[ir.Model]:
    """Draws sums of products of ``x`` [T, K] with experts that are taken from one constant stack ``W``.

    Args:
        max_experts: largest number of experts in the stack, and of products.
        max_size: largest K and N.
        dtypes: element types, of ``DTYPES``.
        placements: where the experts stand, of ``PLACEMENTS``.
        selections: how a matrix is taken from the stack, of ``SELECTIONS``.
        consumers: what multiplies, of ``CONSUMERS``.
        obstacles: what may stand in the way, of ``OBSTACLES``; at most one in a model, and often none.
        names: how nodes and values are named, of ``NAMES``.
        typed: whether values carry types and shapes; None draws that too.
        repeats: whether an expert may be taken more than once, in different spellings.

    Raises:
        InvalidArgument: a name is unknown or a number is not positive.
    """
    _positive(max_experts=max_experts, max_size=max_size)
    return _drawn.unrolled(
        max_experts,
        max_size,
        _known("dtypes", dtypes, DTYPES),
        _known("placements", placements, PLACEMENTS),
        _known("selections", selections, SELECTIONS),
        _known("consumers", consumers, CONSUMERS),
        _known("obstacles", obstacles, OBSTACLES, empty=True),
        _known("names", names, NAMES),
        typed,
        repeats,
    )


def moe_models(
    *,
    max_experts: int = 5,
    max_size: int = 20,
    max_layers: int = 2,
    dtypes: Collection[str] = DTYPES,
    placements: Collection[str] = PLACEMENTS,
    selections: Collection[str] = SELECTIONS,
    routers: Collection[str] = ROUTERS,
    typed: bool | None = None,
) -> st.SearchStrategy[ir.Model]:
    """Draws whole layers: a router, every expert unrolled from constant stacks in one spelling, and their sum.

    Args:
        max_experts: largest number of experts.
        max_size: largest hidden and intermediate size.
        max_layers: largest number of layers, one after the other.
        dtypes: element types, of ``DTYPES``.
        placements: where the layers stand, of ``PLACEMENTS``.
        selections: how a matrix is taken from its stack, of ``SELECTIONS``.
        routers: how experts are chosen, of ``ROUTERS``.
        typed: whether values carry types and shapes; None draws that too.

    Raises:
        InvalidArgument: a name is unknown or a number is not positive.
    """
    _positive(max_experts=max_experts, max_size=max_size, max_layers=max_layers)
    return _drawn.moe(
        max_experts,
        max_size,
        max_layers,
        _known("dtypes", dtypes, DTYPES),
        _known("placements", placements, PLACEMENTS),
        _known("selections", selections, SELECTIONS),
        _known("routers", routers, ROUTERS),
        typed,
    )


def projections(
    *,
    max_size: int = 70,
    dtypes: Collection[str] = DTYPES,
    placements: Collection[str] = PLACEMENTS,
    consumers: Collection[str] = CONSUMERS,
    hindrances: Collection[str] = HINDRANCES,
    typed: bool | None = None,
) -> st.SearchStrategy[ir.Model]:
    """Draws sums of one to three linear maps of ``x`` [T, K], each with a constant weight.

    Args:
        max_size: largest K and N.
        dtypes: element types, of ``DTYPES``.
        placements: where the maps stand, of ``PLACEMENTS``.
        consumers: what multiplies, of ``CONSUMERS``.
        hindrances: what may stand in the way, of ``HINDRANCES``; at most one in a model, and often none.
        typed: whether values carry types and shapes; None draws that too.

    Raises:
        InvalidArgument: a name is unknown or a number is not positive.
    """
    _positive(max_size=max_size)
    return _drawn.projections(
        max_size,
        _known("dtypes", dtypes, DTYPES),
        _known("placements", placements, PLACEMENTS),
        _known("consumers", consumers, CONSUMERS),
        _known("hindrances", hindrances, HINDRANCES, empty=True),
        typed,
    )


def _known(what: str, given: Collection[str], known: Collection[str], *, empty: bool = False) -> tuple[str, ...]:
    if isinstance(given, str) or not (given or empty):
        raise InvalidArgument(f"{what} must be a collection of names, not {given!r}")
    for name in given:
        if name not in known:
            raise InvalidArgument(f"unknown name '{name}' in {what}{nearest(name, known)}")
    return tuple(name for name in known if name in given)


def _positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if not isinstance(number, int) or number < 1:
            raise InvalidArgument(f"{name} must be a positive integer, not {number!r}")
