"""Hits: the rows that a loop over the experts takes, ``where(mask[e])``, one expert's work on them, and the way back.

    slot, token = where(mask[e]); out.index_add_(0, token, expert_e(x[token]) * weights[token, slot])

Facts stated: ``Located`` with content ``Hits`` or ``Hit``; what they gather keeps its content on a ``group`` index, and
what is written back is a ``Mixed`` on tokens again. A token is among the hits of one expert once, as the experts that
a router chose for it are different ones; so rows that are written are rows that are added to zeros.
Source: transformers 4.36 to 4.52 (Mixtral, Qwen2-MoE, OLMoE, DeepSeek-V3 ..) by TorchScript and dynamo.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import onnx_ir as ir

from rewriter.facts import Facts, Family
from rewriter.facts.integers import static
from rewriter.facts.size import Integers, Size
from rewriter.graph.attributes import integer_attribute, text_attribute
from rewriter.rule import Declined
from rewriter.rules.blocks.axes import Atom, Axes, Content, Dim, Located, Uniform, only, put, total
from rewriter.rules.blocks.combines import started
from rewriter.rules.blocks.contents import Router
from rewriter.rules.blocks.laws import of_number, of_two
from rewriter.rules.blocks.mixing import Mask, Mixed, Mixing, Share
from rewriter.rules.blocks.movement import token_rows
from rewriter.rules.blocks.uniform import seeded
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
    """

    router: Router
    expert: int
    slots: frozenset[int]
    dims: tuple[Dim, ...]

    def fix(self, atom: Atom, position: int) -> Content | None:
        if atom.kind != "coordinate":
            return super().fix(atom, position)
        return Hit(self.router, self.expert, self.slots, self.dims[position])


@dataclass(frozen=True)
class Hit(Content):
    """One coordinate of each hit, times a number.

    Attributes:
        router: what chose.
        expert: which.
        slots: the slots that were looked at.
        along: the dimension that it indexes.
        factor: what it is multiplied with.
    """

    router: Router
    expert: int
    slots: frozenset[int]
    along: Dim
    factor: int = 1


@hits.at("NonZero")
def nonzero(facts: Facts, node: ir.Node, mask: ir.Value) -> Located | None:
    """``NonZero(mask of one expert)``: [coordinates, hits]."""
    located = facts.get(mask, Located)
    if located is None or not isinstance(located.content, Mask) or located.content.expert is None:
        return None
    held = located.content
    wide = [i for i, dim in enumerate(located.axes) if only(dim, "slot")]
    if len(wide) != (held.slot is None) or not all(located.axes):
        return None
    slots = frozenset(range(held.router.k) if held.slot is None else {held.slot})
    assert held.expert is not None
    order = 1 + (wide[0] if wide else located.rank + (held.slot or 0))
    size = Size(1, ((held.router.indices, -1 - held.expert - held.router.experts * order),))
    coordinates = (Atom("coordinate", Size(located.rank)),)
    return Located(
        Hits(held.router, held.expert, slots, located.axes), (coordinates, (Atom("group", size, held.expert),))
    )


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
    together = Hits(held[0].router, held[0].expert, held[0].slots, tuple(hit.along for hit in held))
    return Located(together, put(leading.axes, axis, (Atom("coordinate", Size(len(held))),)))


@hits.at("Cast")
def cast(facts: Facts, node: ir.Node, x: ir.Value) -> Located | None:
    """A cast of coordinates between integers."""
    located = facts.get(x, Located)
    to = ir.DataType(integer_attribute(node, "to", 0))
    integral = to in (ir.DataType.INT32, ir.DataType.INT64)
    return located if located is not None and isinstance(located.content, Hits | Hit) and integral else None


@dataclass(frozen=True)
class Outline(Content):
    """What nothing but its shape is asked of."""


@hits.at("Slice")
def first_row(facts: Facts, node: ir.Node, data: ir.Value, *others: ir.Value | None) -> Located | None:
    """The first position along dimensions whose extent nobody knows, all of the others: asked for its shape alone."""
    located = facts.get(data, Located)
    starts, ends = static(facts, node, 1, "starts"), static(facts, node, 2, "ends")
    cut = static(facts, node, 3, "axes", range(len(starts or ())))
    if located is None or starts is None or ends is None or cut is None or others[3:]:
        return None
    axes = list(located.axes)
    for axis, start, end in zip(cut, starts, ends, strict=True):
        if start or end not in (1, *_FAR) or (end == 1 and total(axes[axis]).constant is not None):
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


@hits.at("Gather", "GatherND")
def gather(facts: Facts, node: ir.Node, data: ir.Value, index: ir.Value) -> Located | None:
    """What lies at an expert's hits: rows of tokens, or the weights of their slots."""
    located, taken = _coordinates(facts, node, index), facts.get(data, Located)
    if located is None or facts.get(data, View) is not None:
        return None
    dims, held, where = located
    rows = taken or token_rows(facts, data)
    if rows is None:
        return None
    at = integer_attribute(node, "axis", 0) % rows.rank if node.op_type == "Gather" else 0
    if rows.axes[at : at + len(dims)] != dims:
        return None
    content: Content = rows.content
    if isinstance(content, Mixing):
        slotted = any(atom.kind == "slot" for dim in dims for atom in dim)
        if not slotted or content.router != held.router or content.slot is not None:
            return None
        content = Share(content, held.expert, held.slots)
    return Located(content, (*rows.axes[:at], *where, *rows.axes[at + len(dims) :]))


def _coordinates(facts: Facts, node: ir.Node, index: ir.Value) -> tuple[tuple[Dim, ...], Hits | Hit, Axes] | None:
    """Which dimensions an index of hits takes positions of, and the dimensions that it leaves in their place."""
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


@hits.at("ScatterND")
def scatter_nd(facts: Facts, node: ir.Node, seed: ir.Value, index: ir.Value, rows: ir.Value) -> Located | None:
    """``ScatterND(seed, tokens of the hits [hits, 1], weighted rows)``."""
    located, found = _index_and_rows(facts, node, index, rows)
    if located is None or found is None or located.rank != 2:
        return None
    if located.axes[1]:
        return None
    return _written_back(facts, node, seed, Located(located.content, located.axes[:1]), found)


@hits.at("ScatterElements")
def scatter_elements(facts: Facts, node: ir.Node, seed: ir.Value, index: ir.Value, rows: ir.Value) -> Located | None:
    """``ScatterElements(seed, tokens of the hits, repeated for each feature, weighted rows)`` along the tokens."""
    located, found = _index_and_rows(facts, node, index, rows)
    if located is None or found is None or located.rank != found.rank:
        return None
    if integer_attribute(node, "axis", 0) or not located.rank:
        return None
    for dim, other in zip(located.axes[1:], found.axes[1:], strict=True):
        if any(atom.kind != "repeat" for atom in dim) or total(dim) != total(other):
            return None
    return _written_back(facts, node, seed, Located(located.content, located.axes[:1]), found)


def _index_and_rows(
    facts: Facts, node: ir.Node, index: ir.Value, rows: ir.Value
) -> tuple[Located | None, Located | None]:
    """What is known of both, where the index is one of hits; declines where the rows are known not to be known."""
    located, found = facts.get(index, Located), facts.get(rows, Located)
    if located is None or not isinstance(located.content, Hit):
        return None, None
    if found is None and facts.why_not(rows):
        raise Declined(facts.why_not(rows), node)
    return located, found


def _written_back(facts: Facts, node: ir.Node, seed: ir.Value, index: Located, rows: Located) -> Located | None:
    """The sum so far and the rows of one expert."""
    hit, held = index.content, rows.content
    assert isinstance(hit, Hit)
    if not isinstance(held, Mixed) or hit.factor != 1:
        return None
    for term in held.terms():
        if term.expert != hit.expert or not term.slots <= hit.slots:
            raise Declined(f"rows of expert {term.expert} are written where expert {hit.expert} was chosen", node)
    if rows.axes[:1] != index.axes:
        return None
    back = Located(held, (hit.along, *rows.axes[1:]))
    start = facts.get(seed, Located)
    if start is not None and isinstance(start.content, Uniform):
        return back if seeded(start, back) is not None else None
    if text_attribute(node, "reduction", "none") != "add":
        raise Declined(f"the rows of expert {hit.expert} replace what was summed before", node)
    if start is None or not isinstance(start.content, Mixed) or start.content.mixing != held.mixing:
        return started(facts, seed, start, back, node)
    if start.axes != back.axes:
        return None
    faulty = start.content.mixing if start.content.mixing.fault else held.mixing
    return Located(Mixed(faulty, (start.content, held)), back.axes)
