"""Hits: the rows that a loop over the experts takes, ``where(mask[e])``.

    slot, token = where(mask[e]); out.index_add_(0, token, expert_e(x[token]) * weights[token, slot])

Facts stated: ``Located`` with content ``Hits`` or ``Hit``; what they gather keeps its content on a ``group`` index.
The mask may be of (token, slot), of all slots at once, of one slot, of pairs, or repeated for every feature.
Source: transformers 4.36 to 4.52 (Mixtral, Qwen2-MoE, OLMoE, DeepSeek-V3 ..) by TorchScript and dynamo.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import onnx_ir as ir

from rewriter.facts import Facts, Family
from rewriter.facts.integers import static
from rewriter.facts.size import ONE, Integers, Size
from rewriter.graph.attributes import integer_attribute
from rewriter.rules.blocks.activations import is_plain_linear, number_of
from rewriter.rules.blocks.axes import Atom, Axes, Content, Dim, Located, Uniform, only, put, total, unify
from rewriter.rules.blocks.contents import Router
from rewriter.rules.blocks.laws import of_number, of_two
from rewriter.rules.blocks.mixing import Chosen, Mask, Mixing, Share
from rewriter.rules.blocks.movement import token_rows
from rewriter.rules.blocks.rows import Arange, Order, RowToken
from rewriter.tensors import View

hits = Family("hits")
_FAR = (2**31 - 1, 2**63 - 1)
"""What exporters write for the end of a dimension."""


@dataclass(frozen=True)
class Hits(Content):
    """Where an expert was chosen: coordinates of a mask's elements that hold, in the order of the mask.

    Attributes:
        router: what chose.
        expert: which.
        slots: the slots that were looked at.
        dims: what the mask's dimensions index, one for each coordinate.
        of: the weights that are not nothing there, where it was these that were looked at.
    """

    router: Router
    expert: int
    slots: frozenset[int]
    dims: tuple[Dim, ...]
    of: Mixing | None = None

    def fix(self, atom: Atom, position: int) -> Content | None:
        if atom.kind != "coordinate":
            return super().fix(atom, position)
        return Hit(self.router, self.expert, self.slots, self.dims[position], of=self.of)


@dataclass(frozen=True)
class Hit(Content):
    """One coordinate of each hit, times a number.

    Attributes:
        router: what chose.
        expert: which.
        slots: the slots that were looked at.
        along: the dimension that it indexes.
        factor: what it is multiplied with.
        of: see ``Hits``.
    """

    router: Router
    expert: int
    slots: frozenset[int]
    along: Dim
    factor: int = 1
    of: Mixing | None = None


@hits.at("NonZero")
def nonzero(facts: Facts, node: ir.Node, mask: ir.Value) -> Located | None:
    """``NonZero(mask of one expert)``: [coordinates, hits]; of its share, where that is not nothing."""
    located = facts.get(mask, Located)
    found = None if located is None else _rows(located)
    if located is None or found is None or not all(located.axes):
        return None
    repeated = [i for i, dim in enumerate(located.axes) if any(atom.kind == "repeat" for atom in dim)]
    features = located.axes[-1] if repeated == [located.rank - 1] and len(located.axes[-1]) == 1 else ()
    if len(repeated) != len(features):
        return None
    held, rows = dataclasses.replace(found[0], dims=located.axes), (found[1], *features)
    if located.rank == 1:
        return Located(Hit(held.router, held.expert, held.slots, held.dims[0], of=held.of), ((), rows))
    return Located(held, ((Atom("coordinate", Size(located.rank)),), rows))


@hits.at("ReduceSum")
def count(facts: Facts, node: ir.Node, mask: ir.Value, *others: ir.Value | None) -> Integers | None:
    """How many hits an expert has."""
    located = facts.get(mask, Located)
    found = None if located is None or not isinstance(located.content, Mask) else _rows(located)
    axes = static(facts, node, 1, "axes", range(located.rank if located is not None else 0))
    if located is None or found is None or axes is None or len(axes) != sum(1 for dim in located.axes if dim):
        return None
    scalar = not integer_attribute(node, "keepdims", 1)
    return Integers((found[1].size,), scalar) if scalar or located.rank == 1 else None


def _rows(located: Located) -> tuple[Hits, Atom] | None:
    """The hits that a mask of one expert, or its share, has, and the index that lies along them.

    Masks that hold for the same rows in the same order have the same index: what tells them apart is which slots they
    tell of, and where the slot stands among the token's indices.
    """
    held = located.content
    atoms = [atom for dim in located.axes for atom in dim if atom.kind != "repeat"]
    wide = [i for i, atom in enumerate(atoms) if atom.kind in ("slot", "row")]
    tokens = [atom.index for atom in atoms if atom.kind == "token"]
    if len(tokens) + len(wide) != len(atoms) or tokens != sorted(tokens):
        return None
    alone = isinstance(held, Mask) and (held.whole or (held.router.k == 1 and not wide))
    if isinstance(held, Share) and held.expert is not None and held.slots is not None and not wide:
        router, slots, order, of = held.mixing.router, held.slots, -1, held.mixing
    elif isinstance(held, Mask) and held.expert is not None and len(wide) == (held.slot is None and not alone):
        router, of = held.router, None
        slots = frozenset(range(router.k) if held.slot is None else {held.slot})
        order = 0 if held.whole else 1 + (wide[0] if wide else len(atoms) + (held.slot or 0))
    else:
        return None
    size = Size(1, ((router.indices, -1 - held.expert - router.experts * (1 + order)),))
    return Hits(router, held.expert, slots, (), of), Atom("group", size, held.expert)


@hits.at("Concat")
def coordinates_together(facts: Facts, node: ir.Node, first: ir.Value, *others: ir.Value | None) -> Located | None:
    """Coordinates [hits, 1] side by side."""
    parts = [facts.get(value, Located) for value in (first, *others)]
    held = [part.content for part in parts if part is not None and isinstance(part.content, Hit)]
    leading = parts[0]
    if leading is None or len(held) != len(parts) or any(part is None or part.axes != leading.axes for part in parts):
        return None
    axis = integer_attribute(node, "axis", 0) % leading.rank
    if leading.axes[axis] or any(hit.factor != 1 or hit.slots != held[0].slots for hit in held):
        return None
    together = Hits(held[0].router, held[0].expert, held[0].slots, tuple(hit.along for hit in held), held[0].of)
    return Located(together, put(leading.axes, axis, (Atom("coordinate", Size(len(held))),)))


@hits.at("Max")
def together(facts: Facts, node: ir.Node, first: ir.Value, *others: ir.Value | None) -> Located | None:
    """Coordinates that are broadcast with each other, for the shape that they have."""
    parts = [part for value in (first, *others) if (part := facts.get(value, Located)) is not None]
    of_choice = all(isinstance(part.content, Hit | Arange | Chosen) for part in parts)
    if len(parts) != 1 + len(others) or not others or not of_choice or len({part.rank for part in parts}) > 1:
        return None
    widest = max(parts, key=lambda part: sum(map(bool, part.axes)))
    pairs = [pair for part in parts for pair in zip(part.dims, widest.dims, strict=True)]
    return Located(Outline(), widest.axes) if all(size in (ONE, wide) for size, wide in pairs) else None


@hits.at("Cast")
def cast(facts: Facts, node: ir.Node, x: ir.Value) -> Located | None:
    """A cast of coordinates between integers, or to whether they are 0."""
    located = facts.get(x, Located)
    to = ir.DataType(integer_attribute(node, "to", 0))
    integral = to in (ir.DataType.INT32, ir.DataType.INT64, ir.DataType.BOOL)
    return located if located is not None and isinstance(located.content, Hits | Hit) and integral else None


@dataclass(frozen=True)
class Outline(Content):
    """What nothing but its shape is asked of."""


@hits.at("Slice")
def first_row(facts: Facts, node: ir.Node, data: ir.Value, *others: ir.Value | None) -> Located | None:
    """All of it; or the first along dimensions whose extent nobody knows, all of the others, for its shape alone."""
    located = facts.get(data, Located)
    starts = None if located is None else static(facts, node, 1, "starts")
    if located is None or starts is None or any(starts) or set(static(facts, node, 4, default=[1]) or ()) != {1}:
        return None
    ends, cut = static(facts, node, 2, "ends"), static(facts, node, 3, "axes", range(len(starts)))
    if ends is None or cut is None:
        return None
    if set(ends) <= set(_FAR):  # all of it
        return located
    axes = list(located.axes)
    for axis, end in zip(cut, ends, strict=True):
        if end not in (1, *_FAR) or (end == 1 and total(axes[axis]).constant is not None):
            return None
        axes[axis] = () if end == 1 else axes[axis]
    return Located(Outline(), tuple(axes))


@hits.at("Shape", overrides=True)
def shape(facts: Facts, node: ir.Node, value: ir.Value) -> Integers | None:
    """The shape of what lies along hits, whose number only the router knows."""
    located = facts.get(value, Located)
    if located is None or not (_group(located) or isinstance(located.content, Outline)):
        return None
    dims = tuple(total(dim) for dim in located.axes)
    return Integers(dims[integer_attribute(node, "start", 0) : integer_attribute(node, "end", len(dims))])


def _group(located: Located) -> Atom | None:
    return next((atom for dim in located.axes for atom in dim if atom.kind == "group"), None)


@of_number.at("Mul")
def scale_hit(a: Located, number: float, node: ir.Node) -> Content | None:
    """Returns a coordinate times a number, as flat positions are computed."""
    held = a.content
    return dataclasses.replace(held, factor=held.factor * int(number)) if isinstance(held, Hit) else None


@of_two.at("Add")
def flat_hit(a: Located, b: Located, node: ir.Node) -> Content | None:
    """Returns ``token * k + slot``: a coordinate of the dimension of pairs."""
    outer, inner = a.content, b.content
    if not isinstance(outer, Hit) or not isinstance(inner, Hit) or inner.factor != 1:
        return None
    if total(inner.along) != Size(outer.factor) or outer.slots != inner.slots or outer.router != inner.router:
        return None
    return dataclasses.replace(outer, along=(*outer.along, *inner.along), factor=1)


@hits.at("Less", "GreaterOrEqual", "Mod", "Div")
def hit_arithmetic(facts: Facts, node: ir.Node, a: ir.Value, b: ir.Value) -> Located | None:
    """``pair // k`` and ``pair % k``: the token and the slot of a coordinate of pairs; no coordinate is negative."""
    located, number = facts.get(a, Located), number_of(facts, b)
    if located is None or number is None or not isinstance(located.content, Hit) or located.content.factor != 1:
        return None
    held = located.content
    if node.op_type in ("Less", "GreaterOrEqual"):
        told = Uniform(float(node.op_type == "GreaterOrEqual"))
        return Located(told, located.axes) if number <= 0 else None
    if len(held.along) < 2 or total(held.along[-1:]).constant != number or held.along[-1].kind != "slot":
        return None
    along = held.along[-1:] if node.op_type == "Mod" else held.along[:-1]
    return Located(dataclasses.replace(held, along=along), located.axes)


@hits.at("Gather", "GatherND")
def gather(facts: Facts, node: ir.Node, data: ir.Value, index: ir.Value) -> Located | None:
    """What lies at an expert's hits: rows of tokens, or the weights of their slots."""
    located, taken = coordinates(facts, node, index), facts.get(data, Located)
    if located is None or facts.get(data, View) is not None:
        return None
    dims, held, where = located
    rows = token_rows(facts, data) if taken is None or is_plain_linear(taken.content) else taken
    if rows is None:
        return None
    if held.router.k == 1:
        rows, dims = _of_one_slot(rows), tuple(map(_without_slot, dims))
    at = integer_attribute(node, "axis", 0) % rows.rank if node.op_type == "Gather" else 0
    if unify(rows.axes[at : at + len(dims)], dims) != dims:
        return None
    content: Content | None = rows.content
    if isinstance(content, Mixing):
        content = _share_at(content, held, any(atom.kind in ("slot", "row") for dim in dims for atom in dim))
    elif isinstance(content, Order | RowToken) and isinstance(held, Hit):
        content = _pair_at(content, held)
    return None if content is None else Located(content, (*rows.axes[:at], *where, *rows.axes[at + len(dims) :]))


def _of_one_slot(rows: Located) -> Located:
    """Where a token has one expert, what there is for each slot as what there is for each token."""
    held = rows.content
    if isinstance(held, Mixing) and held.slot is None:
        held = dataclasses.replace(held, slot=0)
    return Located(held, tuple(map(_without_slot, rows.axes)))


def _without_slot(dim: Dim) -> Dim:
    return tuple(atom for atom in dim if atom.kind != "slot")


def _share_at(mixing: Mixing, held: Hits | Hit, slotted: bool) -> Share | None:
    """The share that an expert has by a slot's weight, where it is that slot's expert."""
    if mixing.router != held.router or slotted == (mixing.slot is not None):
        return None
    if mixing.slot is not None and held.slots != {mixing.slot}:
        return None
    return Share(dataclasses.replace(mixing, slot=None), held.expert, held.slots)


def _pair_at(of: Order | RowToken, held: Hit) -> Hit | None:
    """The pair, or the token, that each hit among sorted rows is of."""
    if isinstance(of, RowToken):
        return dataclasses.replace(held, along=of.tokens) if of.exact else None
    return dataclasses.replace(held, along=of.pairs)


def coordinates(facts: Facts, node: ir.Node, index: ir.Value) -> tuple[tuple[Dim, ...], Hits | Hit, Axes] | None:
    """Returns which dimensions an index of hits takes positions of, the hits, and the dimensions put in their place."""
    located = facts.get(index, Located)
    if located is None:
        return None
    held = located.content
    if node.op_type == "Gather":
        return ((held.along,), held, located.axes) if isinstance(held, Hit) and held.factor == 1 else None
    if integer_attribute(node, "batch_dims", 0) or not located.rank:
        return None
    if isinstance(held, Hit) and held.factor == 1 and not located.axes[-1]:
        return (held.along,), held, located.axes[:-1]
    if isinstance(held, Hits) and only(located.axes[-1], "coordinate"):
        return held.dims, held, located.axes[:-1]
    return None
