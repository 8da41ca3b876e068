"""Tables of experts: a choice that depends on nothing but a token's number, as hash layers have it.

Fact stated: ``Located`` with content ``Chosen``.
Source: DeepSeek-V4's first layers, hash routing as torch.onnx writes it: an integer constant, gathered by token ids.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from rewriter.facts import Facts, Family
from rewriter.facts.shapes import shape_of
from rewriter.facts.size import Dims, Size
from rewriter.graph.attributes import integer_attribute
from rewriter.rules.blocks.axes import Atom, Axes, Located, tokens
from rewriter.rules.blocks.contents import Router, Scores
from rewriter.rules.blocks.mixing import Chosen
from rewriter.tensors import View

tables = Family("tables")


@tables.at("Gather")
def gather(facts: Facts, node: ir.Node, table: ir.Value, ids: ir.Value) -> Located | None:
    """``Gather(table [V] or [V, k], ids)``."""
    if not _is_table(facts.get(table, View)) or integer_attribute(node, "axis", 0):
        return None
    return _chosen(facts, node, table, ids, shape_of(facts, ids))


@tables.at("GatherND")
def gather_nd(facts: Facts, node: ir.Node, table: ir.Value, ids: ir.Value) -> Located | None:
    """``GatherND(table, ids [.., 1])``."""
    dims = shape_of(facts, ids) if _is_table(facts.get(table, View)) else None
    if not dims or dims[-1] != Size(1) or integer_attribute(node, "batch_dims", 0):
        return None
    return _chosen(facts, node, table, ids, dims[:-1])


def _is_table(view: View | None) -> bool:
    return view is not None and view.dtype.is_integer() and view.rank in (1, 2)


def _chosen(facts: Facts, node: ir.Node, table: ir.Value, ids: ir.Value, dims: Dims | None) -> Located | None:
    view = facts.get(table, View)
    constant = facts.get(ids, View) is not None or facts.get(ids, Located) is not None
    if view is None or dims is None or constant:
        return None
    numbers = np.asarray(view.numpy())
    k = view.shape[1] if view.rank == 2 else 1
    wide = np.sort(numbers.reshape(-1, k), axis=1)
    if not numbers.size or wide.min() < 0:
        return None
    router = Router(node, Scores(node.outputs[0], "logits"), k, _experts(facts, node) or int(wide.max()) + 1)
    if (wide[:, 1:] == wide[:, :-1]).any():  # a token has an expert twice
        router = dataclasses.replace(router, made=(router,))
    slots: Axes = () if view.rank == 1 else ((Atom("slot", Size(k)),),)
    return Located(Chosen(router, 0 if view.rank == 1 else None), (*tokens(dims), *slots))


def _experts(facts: Facts, node: ir.Node) -> int | None:
    """How many scores the choice is among, where it takes its weights from some: a table need not name every expert."""
    for use in node.outputs[0].uses():
        if use.node.op_type == "GatherElements" and use.idx == 1 and use.node.inputs[0] is not None:
            dims = shape_of(facts, use.node.inputs[0])
            return dims[-1].constant if dims else None
    return None
