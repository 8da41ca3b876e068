"""Counted rows: how many each expert has, where they end, and rows that are split by these counts.

Facts stated: ``Located`` with content ``Counts`` or ``Mask``; the pieces of a Split keep their content, on a ``group``
index.
Source: bincount and histograms, ``split(counts)`` behind a sort, as torch.onnx writes them; JetMoE.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from rewriter.facts import Facts, Family
from rewriter.facts.integers import static
from rewriter.facts.size import Size
from rewriter.graph.attributes import integer_attribute, text_attribute
from rewriter.graph.declines import NO_LOOP
from rewriter.rule import Declined
from rewriter.rules.blocks.axes import Atom, Content, Dim, Located, Uniform, only, total
from rewriter.rules.blocks.contents import Router
from rewriter.rules.blocks.laws import of_two
from rewriter.rules.blocks.mixing import Chosen, Mask
from rewriter.rules.blocks.rows import Count, Counts, End, Sorted, of_expert
from rewriter.tensors import View

counts = Family("counts")


@counts.at("ScatterElements")
def histogram(facts: Facts, node: ir.Node, zeros: ir.Value, experts: ir.Value, ones: ir.Value) -> Located | None:
    """``ScatterElements(zeros [E], experts of the rows, ones, reduction=add)``: how many rows each expert has."""
    located, updates = facts.get(experts, Located), facts.get(ones, Located)
    if located is None or updates is None or not isinstance(located.content, Sorted):
        return None
    router = located.content.router
    if updates.content != Uniform(1.0) or text_attribute(node, "reduction", "none") != "add":
        return None
    if located.content.values != tuple(float(e) for e in range(router.experts)):
        raise Declined("the histogram counts something other than each expert's rows", node)
    require_whole_numbers(zeros.dtype, node)
    seed, begin = facts.get(zeros, Located), facts.get(zeros, View)
    counted = begin is not None and begin.shape == (router.experts,) and not np.any(begin.numpy())
    if seed is not None and seed.content == Uniform(0.0):
        counted = seed.rank == 1 and total(seed.axes[0]) == Size(router.experts)
    return Located(Counts(router), (_experts(router),)) if counted else None


def require_whole_numbers(dtype: ir.DataType | None, node: ir.Node) -> None:
    """Declines where rows are counted or numbered in a type that has too few whole numbers."""
    if dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        most = 2048 if dtype == ir.DataType.FLOAT16 else 256
        raise Declined(f"rows are counted in {dtype.name}, which rounds whole numbers above {most}", node)


@counts.at("ScatterElements")
def hot(facts: Facts, node: ir.Node, zeros: ir.Value, chosen: ir.Value, ones: ir.Value) -> Located | None:
    """``ScatterElements(zeros [.., E], choice, ones)``: which tokens are each expert's; or, of all pairs, how many."""
    seed, index, updates = (facts.get(v, Located) for v in (zeros, chosen, ones))
    if index is None or updates is None or not isinstance(index.content, Chosen) or updates.content != Uniform(1.0):
        return None
    held, added = index.content, text_attribute(node, "reduction", "none") == "add"
    flat = index.rank == 1 and added and bool(index.axes[0]) and index.axes[0][-1].kind == "slot"
    wide = (() if flat else index.axes[:-1]) + (_experts(held.router),)
    begin = facts.get(zeros, View)
    empty = begin is not None and begin.shape == (held.router.experts,) and not np.any(begin.numpy()) and flat
    if seed is not None and seed.content == Uniform(0.0):
        empty = [total(dim) for dim in seed.axes] == [total(dim) for dim in wide]
    if (
        not empty
        or held.slot is not None
        or held.router.made
        or integer_attribute(node, "axis", 0) % index.rank != index.rank - 1
    ):
        return None
    if flat:
        return Located(Counts(held.router), wide)
    return Located(Mask(held.router, None, whole=True), wide) if only(index.axes[-1], "slot") else None


@counts.at("ReduceSum")
def count_hot(facts: Facts, node: ir.Node, data: ir.Value, *others: ir.Value | None) -> Located | None:
    """How many tokens are each expert's."""
    located = facts.get(data, Located)
    held = None if located is None else located.content
    if located is None or not isinstance(held, Mask) or not held.whole or located.rank != 2:
        return None
    axes = static(facts, node, 1, "axes", [])
    if axes not in ([0], [-2]) or integer_attribute(node, "keepdims", 1) or not only(located.axes[1], "expert"):
        return None
    require_whole_numbers(data.dtype, node)
    return Located(Counts(held.router), located.axes[1:])


@counts.at("Concat")
def counts_together(facts: Facts, node: ir.Node, first: ir.Value, *others: ir.Value | None) -> Located | None:
    """The counts of all experts, one after the other."""
    parts = [facts.get(value, Located) for value in (first, *others)]
    held = [part.content for part in parts if part is not None and part.axes == ((),)]
    each = [one for one in held if isinstance(one, Count)]
    if not each or len(each) != len(parts) or len(each) != each[0].router.experts:
        return None
    router = each[0].router
    if each != [Count(router, expert) for expert in range(router.experts)]:
        raise Declined("rows are split by counts that are not those of every expert in turn", node)
    return Located(Counts(router), (_experts(router),))


@counts.at("Split")
def split_rows(facts: Facts, node: ir.Node, data: ir.Value, lengths: ir.Value) -> dict[ir.Value, object] | None:
    """Sorted rows, split into those of every expert."""
    located, counted = facts.get(data, Located), facts.get(lengths, Located)
    atom = only(located.axes[0], "row") if located is not None and located.rank else None
    if atom is not None and facts.get(lengths, View) is not None and not integer_attribute(node, "axis", 0):
        raise Declined("the trace fixed how many rows each expert has: Split is by constants", node, remedy=NO_LOOP)
    if located is None or counted is None or not isinstance(counted.content, Counts) or not located.rank:
        return None
    router = counted.content.router
    if counted.content.cumulated or integer_attribute(node, "axis", 0) or len(node.outputs) != router.experts:
        return None
    if atom is None or atom.index != id(router.node):
        return None
    return {
        out: Located(of_expert(located.content, expert), (group_of(router, expert), *located.axes[1:]))
        for expert, out in enumerate(node.outputs)
    }


@of_two.at("Add")
def next_end(a: Located, b: Located, node: ir.Node) -> End | None:
    """Returns where the rows of an expert end: where those of the one before do, and as many farther."""
    before, count = a.content, b.content
    if not isinstance(count, Count) or not isinstance(before, End | Count) or before.router != count.router:
        return None
    first = isinstance(before, End) or before.expert == 0  # the first ones end where they are as many
    return End(count.router, count.expert) if first and before.expert == count.expert - 1 else None


@counts.at("Slice")
def rows_between(
    facts: Facts, node: ir.Node, data: ir.Value, start: ir.Value, end: ir.Value, *others: ir.Value | None
) -> Located | None:
    """Sorted rows from where those of one expert end to where those of the next do."""
    located, first, last = facts.get(data, Located), facts.get(start, Located), facts.get(end, Located)
    if located is None or last is None or not located.rank or static(facts, node, 3, default=[0]) != [0]:
        return None
    until, atom = _end_of(last.content), only(located.axes[0], "row")
    if until is None or atom is None or atom.index != id(until.router.node):
        return None
    before, begin = None if first is None else _end_of(first.content), static(facts, node, 1)
    one_by_one = static(facts, node, 4, default=[1]) == [1]
    if not one_by_one or (before != End(until.router, until.expert - 1) if until.expert else begin != [0]):
        raise Declined(f"the rows of expert {until.expert} do not begin where those of the one before end", node)
    content = of_expert(located.content, until.expert)
    return Located(content, (group_of(until.router, until.expert), *located.axes[1:]))


def _end_of(held: Content) -> End | None:
    """Where rows end: those of the first expert where they are as many."""
    if isinstance(held, Count) and held.expert == 0:
        return End(held.router, 0)
    return held if isinstance(held, End) else None


def group_of(router: Router, expert: int) -> Dim:
    """Returns the dimension of an expert's rows."""
    return (Atom("group", Size(1, ((router.indices, -1 - expert),)), expert),)


def _experts(router: Router) -> Dim:
    return (Atom("expert", Size(router.experts)),)


@counts.at("CumSum")
def cum_sum(facts: Facts, node: ir.Node, counts: ir.Value, axis: ir.Value) -> Located | None:
    """Where each expert's rows end."""
    located, along = facts.get(counts, Located), static(facts, node, 1)
    if located is not None and isinstance(located.content, Mask) and along is not None:
        if any(atom.kind == "token" for atom in located.axes[along[0]]):
            reason = (
                "a CumSum numbers the tokens of each expert, as where a capacity drops some, which no operator does"
            )
            raise Declined(reason, node)
        return None
    if located is None or not isinstance(located.content, Counts) or located.content.cumulated:
        return None
    if integer_attribute(node, "exclusive", 0) or integer_attribute(node, "reverse", 0):
        return None
    return dataclasses.replace(located, content=Counts(located.content.router, cumulated=True))
