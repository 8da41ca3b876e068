"""Random inputs for a matched subgraph and its replacement, of shapes that its operators can take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.engine.proposal import Rewrite
from rewriter.errors import UnprovedError
from rewriter.graph.contents import integer
from rewriter.graph.declines import INFER_SHAPES
from rewriter.graph.walk import readers, walk
from rewriter.operators.form import Routed, routed
from rewriter.parity.edges import Variation, are_scores, floats_at_edges, integers_at_edges
from rewriter.rule import Declined, Fed
from rewriter.text import nbytes

Feeds = dict[str, npt.NDArray[Any]]
_MOVED = ("Unsqueeze", "Squeeze", "Reshape", "Cast")
Shape = tuple[int, ...]

FIRST = Variation()

_SIZES = (2, 3, 5, 7)
"""Sizes for symbolic dimensions, all different, so that two of them are not mistaken for one another."""

_MANY = 11
"""Least size of a dimension that one of these is too small for."""

_RANGE = 3
"""Largest magnitude of ranked numbers: logits of which the softmax is neither flat nor one-hot."""

_LARGEST = 1 << 28
"""Bytes of one input that a proof draws: a model may declare any number of rows."""

_LEAST = 0.125
"""Smallest of positive numbers: no sum of them is near zero."""


def random_feeds(
    fed: Mapping[ir.Value, str],
    generator: np.random.Generator,
    rewrite: Rewrite,
    experts: range | None = None,
    how: Variation = FIRST,
) -> Feeds:
    """Draws the inputs that both sides share; symbolic dimensions of one name have one size.

    Where a router chooses k of E experts, there are rows enough for every expert to be chosen in one of them: a proof
    in which an expert has no part says nothing of it.

    Args:
        fed: the values, and the names under which they are fed.
        generator: draws them.
        rewrite: says which operators read them.
        experts: which experts of a stack are run, or None for all.
        how: by default with symbolic dimensions that are all different, and rows enough for every expert.

    Raises:
        Declined: the type of a value is unknown.
        UnprovedError: a value is declared with a size that is not drawn.
    """
    sizes: dict[str, int] = {} if how.rows is None else _Alike(how.rows)
    sample = None if experts is None else len(experts)
    feeds: Feeds = {}
    for value in fed if how.rows is None else ():
        _make_room(value, rewrite, sizes, sample)
    for value, name in fed.items():
        if value in rewrite.fed:
            feeds[name] = _as_told(rewrite.fed[value], sizes, generator, how)
            continue
        shape = _routed_shape(value, _multiplied_shape(value, _shape(value, sizes), rewrite), rewrite, sizes, sample)
        dtype = value.dtype or _routed_dtype(value, rewrite) or _multiplied_dtype(value, rewrite)
        if dtype is None or shape is None:
            reason = f"the type of '{value.name}' is unknown, so nothing can be proved"
            raise Declined(reason, value, remedy=INFER_SHAPES)
        _require_small(value, shape, dtype, rewrite)
        if dtype.is_floating_point():
            drawn: npt.NDArray[Any] = generator.standard_normal(shape, dtype=np.float32)
            chosen = _chosen(value, rewrite)
            drawn = _ranked(drawn, chosen, generator) if chosen else drawn
            logits = bool(chosen) or are_scores(value, rewrite)
            feeds[name] = floats_at_edges(drawn, how, logits=logits).astype(dtype.numpy())
        elif how.infinite and dtype.is_integer():
            signed = how.signed and dtype.is_signed()
            drawn = integers_at_edges(generator, shape, _rows(value, rewrite), signed=signed)
            feeds[name] = drawn.astype(dtype.numpy())
        else:
            feeds[name] = generator.integers(0, _rows(value, rewrite) or 2, shape).astype(dtype.numpy())
    return feeds


def _require_small(value: ir.Value, shape: Shape, dtype: ir.DataType, rewrite: Rewrite) -> None:
    size = math.prod(shape) * dtype.itemsize
    if size > _LARGEST:
        message = f"'{value.name}' is declared as {list(shape)}: {nbytes(size)} are not drawn for a proof"
        raise UnprovedError(rewrite.rule, rewrite.where, f"{message}; give it a symbolic dimension")


class _Alike(dict[str, int]):
    """Gives every dimension one size."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def setdefault(self, name: str, default: int = 0) -> int:
        """Overrides how a size is given to a dimension that has none."""
        return super().setdefault(name, self._size)


def drawn_size(shape: Sequence[tuple[int, tuple[str, ...]]], sizes: dict[str, int]) -> Shape:
    """Returns the shape with a size for each unknown; those that have none yet are added to ``sizes``."""
    return tuple(factor * math.prod(_size(name, sizes) for name in names) for factor, names in shape)


def _as_told(fed: Fed, sizes: dict[str, int], generator: np.random.Generator, how: Variation) -> npt.NDArray[Any]:
    """Draws a value as the rule describes it."""
    shape = drawn_size(fed.shape, sizes)
    if fed.total:
        return np.full(shape, sum(_size(name, sizes) for name in fed.total) + fed.plus, fed.dtype.numpy())
    if fed.below:
        return generator.integers(0, fed.below, shape).astype(fed.dtype.numpy())
    drawn: npt.NDArray[Any] = generator.standard_normal(shape, dtype=np.float32)
    if fed.chosen:
        drawn = _ranked(drawn, fed.chosen, generator)
    if fed.positive:
        drawn = drawn - drawn.min(axis=-1, keepdims=True) + _LEAST
    edged = floats_at_edges(drawn, how, logits=bool(fed.chosen), positive=fed.positive)
    return edged.astype(fed.dtype.numpy())


def _ranked(drawn: npt.NDArray[Any], chosen: int, generator: np.random.Generator) -> npt.NDArray[Any]:
    """Returns evenly spaced numbers in random order; in turn each position is among the ``chosen`` largest of a row."""
    width = drawn.shape[-1]
    turns = generator.permutation(width)
    for row, start in zip(drawn.reshape(-1, width), range(0, width, chosen), strict=False):
        row[turns[start : start + chosen]] += 2 * np.abs(drawn).max()
    ranked: npt.NDArray[Any] = 2 * drawn.argsort(axis=-1).argsort(axis=-1) / max(1, width - 1) - 1
    return ranked * _RANGE


def _make_room(value: ir.Value, rewrite: Rewrite, sizes: dict[str, int], experts: int | None) -> None:
    """Sizes an unknown dimension so that there are rows enough, where a router chooses by ``value``."""
    chosen = _chosen(value, rewrite)
    told = rewrite.fed.get(value)
    if not chosen:
        return
    if told is not None:
        rows, (width, _) = told.shape[:-1], told.shape[-1]
        names = [name for _, unknown in rows for name in unknown]
        known = math.prod(factor for factor, _ in rows)
    else:
        read = _routed(value, rewrite)
        x = None if read is None else read.x
        if read is None or x is None or x.shape is None or read.experts is None:
            return
        width = experts or read.experts
        names = [_key(x, axis) for axis, dim in enumerate(x.shape[:-1]) if not isinstance(dim, int)]
        known = math.prod(dim for dim in x.shape[:-1] if isinstance(dim, int))
    if not names or not known:
        return
    *others, last = names
    needed = -(-width // (chosen * known * math.prod(_size(name, sizes) for name in others)))
    if _size(last, sizes) < needed:
        sizes[last] = max(needed, _MANY)


def _chosen(value: ir.Value, rewrite: Rewrite) -> int:
    """How many experts a router chooses by ``value``; 0 where none does."""
    if value in rewrite.fed:
        return rewrite.fed[value].chosen
    read = _routed(value, rewrite)
    return 0 if read is None else read.k


def _routed(value: ir.Value, rewrite: Rewrite) -> Routed | None:
    """What the matched MoE or QMoE reads that ``value`` is the logits of."""
    return next((read for node in rewrite.matched if (read := routed(node)) and read.logits is value), None)


def _size(name: str, sizes: dict[str, int]) -> int:
    return sizes.setdefault(name, _SIZES[len(sizes) % len(_SIZES)])


def _rows(value: ir.Value, rewrite: Rewrite) -> int | None:
    """How many rows a matched gather may look up by the value; None for integers that are no index."""

    def moved(at: ir.Value) -> list[ir.Value]:
        moving = (node for node in readers(at) if node in rewrite.matched and node.op_type in _MOVED)
        return [out for node in moving for out in node.outputs]

    for at in walk([value], moved, limit=None):
        for use in at.uses():
            table = use.node.inputs[0]
            looked_up = use.node in rewrite.matched and use.node.op_type in ("Gather", "GatherND") and use.idx == 1
            if looked_up and table is not None and table.shape:
                extent = table.shape[integer(use.node, "axis", 0)]
                return extent if isinstance(extent, int) else None
    return None


def related_nodes(rewrite: Rewrite) -> set[ir.Node]:
    """Nodes that compute one input of the matched nodes from others, as router_weights from the logits."""
    read = {value for node in rewrite.matched for value in node.inputs if value is not None}
    producers = {value.producer() for value in read}
    return {
        node
        for node in producers
        if node is not None and node.inputs and node not in rewrite.matched and read.issuperset(node.inputs)
    }


def _shape(value: ir.Value, sizes: dict[str, int]) -> Shape | None:
    if value.shape is None:
        return None
    shape = []
    for axis, dim in enumerate(value.shape):
        if isinstance(dim, int):
            shape.append(dim)
        else:
            shape.append(_size(_key(value, axis), sizes))
    return tuple(shape)


def _key(value: ir.Value, axis: int) -> str:
    """What an unknown dimension is called."""
    assert value.shape is not None
    dim = value.shape[axis]
    name = None if isinstance(dim, int) else dim.value
    return name or f"{value.name}:{axis}"


def _multiplied_shape(value: ir.Value, shape: Shape | None, rewrite: Rewrite) -> Shape | None:
    """The shape, its last dimension taken from a weight that multiplies the value."""
    for node in rewrite.matched:
        if node.op_type in ("MatMul", "Gemm") and node.inputs[0] is value and node.inputs[1] is not None:
            weight = node.inputs[1].shape
            transposed = integer(node, "transB", 0)
            if weight is not None and isinstance(depth := weight[-1 if transposed else -2], int):
                return (*(shape or (3, 0))[:-1], depth)
    return shape


def _multiplied_dtype(value: ir.Value, rewrite: Rewrite) -> ir.DataType | None:
    """The dtype of a weight that multiplies the value, which is the value's own."""
    readers = (n for n in rewrite.matched if n.op_type in ("MatMul", "Gemm") and n.inputs[0] is value)
    weights = (node.inputs[1] for node in readers)
    return next((weight.dtype for weight in weights if weight is not None and weight.dtype is not None), None)


def _routed_dtype(value: ir.Value, rewrite: Rewrite) -> ir.DataType | None:
    """The dtype of an MoE's weights, which x and the logits share."""
    reads = (read for node in rewrite.matched if value in node.inputs and (read := routed(node)))
    return next((read.dtype for read in reads if read.dtype is not None), None)


def _routed_shape(
    value: ir.Value, shape: Shape | None, rewrite: Rewrite, sizes: dict[str, int], sample: int | None
) -> Shape | None:
    """The shape of what feeds an MoE or QMoE: x [.., H], and one row of logits [E] for each token of x."""
    for node in rewrite.matched:
        read = routed(node)
        if read is None or read.x is None or read.experts is None or read.hidden is None:
            continue
        experts = sample or read.experts
        lead = (_shape(read.x, sizes) or (3, read.hidden))[:-1]
        if value is read.x:
            declared = None if value.shape is None else value.shape[-1]
            return (*lead, declared if isinstance(declared, int) else read.hidden)
        if value is read.logits or value is read.mixing:
            return (*lead, experts) if shape is not None and len(shape) == 3 else (math.prod(lead), experts)
    return shape
