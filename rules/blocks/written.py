"""Rows of one expert, written back to where they come from: by a scatter that adds, or by one over zeros.

Facts stated: ``Located`` with content ``Mixed``, on tokens again; or ``Filled``, and the ``Output`` of the chosen
experts once the rows of all are there. A token is among the hits of one expert once, as the experts that a router chose
for it are different ones: so rows that are written over zeros are rows that are added to them.
Source: index_add_, index_put_, ``out[rows] += y`` and ``out[mask] = y``, as TorchScript and dynamo write them.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from rewriter.facts import Facts, Family
from rewriter.graph.attributes import integer_attribute, text_attribute
from rewriter.graph.declines import WHOLE_BLOCK, reason_of
from rewriter.rule import Declined
from rewriter.rules.blocks.axes import Axes, Content, Located, Uniform, total, unify
from rewriter.rules.blocks.combines import started
from rewriter.rules.blocks.contents import Output, Slot, Tokens
from rewriter.rules.blocks.hits import Hit, Hits, coordinates
from rewriter.rules.blocks.joined import joined
from rewriter.rules.blocks.mixing import Filled, Mixed, Start
from rewriter.rules.blocks.movement import token_rows
from rewriter.rules.blocks.uniform import seeded
from rewriter.rules.blocks.unknown import why_unknown

written = Family("written")


@dataclass(frozen=True)
class _Rows:
    """Rows, and where they go.

    Attributes:
        at: the hits.
        content: what the rows hold.
        axes: of what they are written into.
    """

    at: Hit | Hits
    content: Content
    axes: Axes


@written.at("ScatterND")
def scatter_nd(facts: Facts, node: ir.Node, seed: ir.Value, index: ir.Value, rows: ir.Value) -> Located | None:
    """``ScatterND(seed, coordinates of the hits, rows)``; with a coordinate for the feature, the rows are flat."""
    found, located = coordinates(facts, node, index), facts.get(rows, Located)
    if found is None:
        return None
    dims, at, where = found
    if located is None:
        _decline_unknown(facts, node, rows)
        return None
    others = [atom.index for dim in located.axes for atom in dim if atom.kind == "group" and atom.index != at.expert]
    if others:
        raise Declined(f"rows of expert {others[0]} are written where expert {at.expert} was chosen", node)
    lead = unify(where, located.axes[: len(where)])
    if lead is None or not lead:
        return None
    axes = (*dims, *located.axes[len(where) :])
    if any(atom.kind == "repeat" for atom in dims[-1]):
        axes = (*dims[:-1], lead[-1][1:], *located.axes[len(where) :])
    elif lead != located.axes[: len(where)]:
        return None
    return _written_back(facts, node, seed, _Rows(at, located.content, axes))


@written.at("ScatterElements")
def scatter_elements(facts: Facts, node: ir.Node, seed: ir.Value, index: ir.Value, rows: ir.Value) -> Located | None:
    """``ScatterElements(seed, tokens of the hits, repeated for each feature, rows)`` along the tokens."""
    located, found = facts.get(index, Located), facts.get(rows, Located)
    if located is None or not isinstance(located.content, Hit):
        return None
    if found is None:
        _decline_unknown(facts, node, rows)
        return None
    if located.rank != found.rank or integer_attribute(node, "axis", 0) or not located.rank:
        return None
    for dim, other in zip(located.axes[1:], found.axes[1:], strict=True):
        if any(atom.kind != "repeat" for atom in dim) or total(dim) != total(other):
            return None
    held = located.content
    if found.axes[:1] != located.axes[:1] or held.factor != 1:
        return None
    return _written_back(facts, node, seed, _Rows(held, found.content, (held.along, *found.axes[1:])))


def _decline_unknown(facts: Facts, node: ir.Node, rows: ir.Value) -> None:
    """Declines where nothing is known of the rows.

    Raises:
        Declined: why.
    """
    reason, culprit = why_unknown(facts, rows, node)
    raise Declined(reason, culprit, remedy=reason_of(reason).remedy)


def _written_back(facts: Facts, node: ir.Node, seed: ir.Value, rows: _Rows) -> Located | None:
    """The sum so far and the rows of one expert."""
    start, held = facts.get(seed, Located), rows.content
    added = text_attribute(node, "reduction", "none") == "add"
    if isinstance(held, Output):
        if not added or _is_number(start):
            return _filled(start or token_rows(facts, seed), held, rows, node)
        start, held = _as_sum(start, node), Filled(rows.at.router, rows.at.expert, held, None, 1).summed(node) or held
    if not isinstance(held, Mixed):
        return None
    again = _added_to(facts, seed, start, held, rows.at, node)
    own = held if again is None else again[1]
    if own.begun:
        raise Declined(f"to the rows of expert {rows.at.expert} something is added that is no sum of experts", node)
    for term in own.terms():
        if term.expert != rows.at.expert or not term.slots <= rows.at.slots:
            reason = f"rows of expert {term.expert} are written where expert {rows.at.expert} was chosen"
            raise Declined(reason, node)
    if rows.at.of is not None and rows.at.of != own.mixing:
        raise Declined("rows are taken by other weights than those that they are mixed with", node)
    back = Located(held, rows.axes)
    if again is not None:
        return None if added else Located(again[0], rows.axes)
    if start is not None and isinstance(start.content, Uniform):
        return back if seeded(start, back) is not None else None
    if not added and not _apart(start, rows):
        raise Declined(f"the rows of expert {rows.at.expert} replace what was summed before", node)
    if start is None or not isinstance(start.content, Mixed) or start.content.mixing != held.mixing:
        return started(facts, seed, start, back, node)
    if start.axes != back.axes:
        return None
    faulty = start.content.mixing if start.content.mixing.fault else held.mixing
    return Located(Mixed(faulty, (start.content, held)), back.axes)


def _as_sum(start: Located | None, node: ir.Node) -> Located | None:
    """Outputs that were put in as a sum, where each token has one."""
    mixed = start.content.summed(node) if start is not None and isinstance(start.content, Filled) else None
    return start if start is None or mixed is None else Located(mixed, start.axes)


def _added_to(
    facts: Facts, seed: ir.Value, start: Located | None, held: Mixed, at: Hit | Hits, node: ir.Node
) -> tuple[Mixed, Mixed] | None:
    """The sum and what is new in it, where the rows are those of ``seed`` plus an expert's, as ``seed[rows] += y``."""
    if len(held.parts) != 2:
        return None
    for before, own in (held.parts, held.parts[::-1]):
        if not isinstance(own, Mixed):
            continue
        if start is not None and before is start.content:
            return held, own
        if isinstance(before, Start) and _takes(facts, before.value, seed, at):
            return Mixed(held.mixing, (Start(seed, node), own)), own
    return None


def _takes(facts: Facts, value: ir.Value, seed: ir.Value, at: Hit | Hits) -> bool:
    """Whether a value is the rows of ``seed`` at these hits."""
    node = value.producer()
    if node is None or node.op_type not in ("Gather", "GatherND") or node.inputs[0] is not seed:
        return False
    index = node.inputs[1]
    found = None if index is None else coordinates(facts, node, index)
    dims = at.dims if isinstance(at, Hits) else (at.along,)
    if found is None or (found[1].expert, found[1].slots) != (at.expert, at.slots):
        return False
    return found[0] == dims[: len(found[0])]


def _apart(start: Located | None, rows: _Rows) -> bool:
    """Whether the rows of one expert are written where no other's are, as each token has one expert there."""
    if start is None or not isinstance(start.content, Mixed) or start.content.begun or rows.at.router.made:
        return False
    return rows.at.router.k == 1 or any(atom.kind in ("slot", "row") for dim in rows.axes for atom in dim)


def _is_number(start: Located | None) -> bool:
    return start is not None and isinstance(start.content, Uniform)


def _filled(start: Located | None, output: Output, rows: _Rows, node: ir.Node) -> Located | None:
    """Outputs of one more expert, where nothing was before; of the last, what the router's choice returns."""
    if start is None or rows.at.of is not None:
        return None
    at, held = rows.at, start.content
    if isinstance(held, Output):
        raise Declined(f"the rows of expert {at.expert} are put where those of all experts are", node)
    if not isinstance(held, Uniform | Tokens | Filled):
        return None
    slots = [atom for dim in rows.axes for atom in dim if atom.kind in ("slot", "row")]
    if len(slots) != 1 and len(at.slots) != 1:
        raise Declined(f"the rows of expert {at.expert} replace those of others: a token has several experts", node)
    if not isinstance(held, Filled):  # all of it is written over
        if unify(start.axes, rows.axes) != rows.axes:
            return None
        filled = Filled(at.router, at.expert, output, None, 1)
    elif start.axes != rows.axes or held.router != at.router:
        return None
    else:
        filled = Filled(at.router, at.expert, output, held, held.count + 1)
    if filled.count < at.router.experts:
        return Located(filled, rows.axes)
    found = filled.outputs()
    missing = next((e for e in range(at.router.experts) if e not in found), None)
    if missing is not None:
        raise Declined(f"expert {missing} of {at.router.experts} is missing", node, remedy=WHOLE_BLOCK)
    by = at.router if slots else Slot(at.router, next(iter(at.slots)))
    together = joined([found[e] for e in range(at.router.experts)], by)
    return None if together is None else Located(together, rows.axes)
