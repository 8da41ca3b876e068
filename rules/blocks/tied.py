"""What the rules on tied embeddings share: which linears read the table, or an equal one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from rewriter.facts import Facts
from rewriter.graph.attributes import integer_attribute
from rewriter.graph.declines import MIN_BYTES, OTHER_RULES_WEIGHTS, stays_float
from rewriter.rule import Declined, NotApplicable, Run
from rewriter.rules.blocks.guards import FLOATS
from rewriter.rules.blocks.readers import gathers_rows, readers
from rewriter.tensors import View, same_elements


@dataclass(frozen=True)
class Table:
    """An embedding and the linears that are it, transposed.

    Attributes:
        view: [V, H].
        gathers: every node that looks it up.
        heads: the linears, each with its weight as [V, H].
        shared: whether the linears read the constant that the gathers read, and not an equal one.
    """

    view: View
    gathers: tuple[ir.Node, ...]
    heads: tuple[tuple[ir.Node, View], ...]
    shared: bool


def read_table(run: Run, gather: ir.Node, min_bytes: int) -> Table:
    """Reads what ``gather`` looks up and the linears that are tied to it, or declines."""
    facts = run.facts
    w, ids = gather.inputs[0], gather.inputs[1]
    view = facts.get(w, View)
    if w is None or view is None or facts.get(ids, View) is not None:
        raise NotApplicable
    if view.rank != 2 or view.dtype not in FLOATS or not gathers_rows(gather):
        raise NotApplicable
    uses = list(readers(facts, w))
    heads = [(use.node, own) for use in uses if (own := weight_of(facts, use.node)) is not None and use.idx == 1]
    shared = bool(heads)
    if not shared and run.role(gather).name == "embedding":
        heads = _equal_heads(facts, gather, view)
        uses += [use for node, _ in heads for use in readers(facts, inputs_of(node)[1]) if use.node is not node]
    if not heads:
        raise NotApplicable
    if view.nbytes < min_bytes:
        raise Declined(f"the table takes {view.nbytes} bytes, fewer than min_bytes = {min_bytes}", w, remedy=MIN_BYTES)
    linears = {node for node, _ in heads}
    gathers = []
    for use in uses:
        if use.node.graph is not gather.graph:
            raise Declined("the table is read in several graphs", use.node)
        if use.node in linears:
            continue
        if use.node.op_type != "Gather" or use.idx or not gathers_rows(use.node):
            raise stays_float(use.node)
        if facts.get(use.node.inputs[0], View) != view:
            raise Declined("it is looked up in another orientation", use.node)
        gathers.append(use.node)
    for node, own in heads:
        if own.shape != view.shape or (shared and own != view):
            raise Declined("the linear reads it in another orientation", node)
    return Table(view, tuple(gathers), tuple(heads), shared)


def weight_of(facts: Facts, node: ir.Node) -> View | None:
    """Returns the constant weight of a MatMul or Gemm as [N, K], or None."""
    if node.op_type not in ("MatMul", "Gemm") or node.domain not in ("", "ai.onnx"):
        return None
    view = facts.get(node.inputs[1], View)
    if view is None or view.rank != 2:
        return None
    return view if node.op_type == "Gemm" and integer_attribute(node, "transB", 0) else view.T


def inputs_of(node: ir.Node) -> tuple[ir.Value, ir.Value]:
    """Returns what a MatMul or Gemm multiplies."""
    x, w = node.inputs[:2]
    assert x is not None
    assert w is not None
    return x, w


def _equal_heads(facts: Facts, gather: ir.Node, table: View) -> list[tuple[ir.Node, View]]:
    """Returns the first linear of the graph whose weight equals the table; declines where one of its shape differs."""
    unequal: ir.Node | None = None
    for node, own in _of_shape(facts, gather, table):
        if same_elements(own, table):
            return [(node, own)]
        unequal = node
    if unequal is not None:
        weight = inputs_of(unequal)[1].name
        reason = f"it is not tied: '{table.name}' and the linear's weight '{weight}' are not equal"
        raise Declined(reason, unequal, remedy=OTHER_RULES_WEIGHTS, expected=True)
    return []


def _of_shape(facts: Facts, gather: ir.Node, table: View) -> Iterator[tuple[ir.Node, View]]:
    for node in gather.graph or ():
        own = weight_of(facts, node)
        if own is not None and own.shape == table.shape and own.dtype == table.dtype:
            yield node, own
