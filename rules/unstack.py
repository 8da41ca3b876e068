"""Unstack: one expert's weight, selected statically from a constant stack, becomes an initializer of its own.

Matched:      the last operator of a chain of movement operators over a constant, with constant operands:
              Gather(stack, e) -> Squeeze -> Transpose, Split(stack) -> Squeeze, Slice -> Transpose, ...
Replacement:  an initializer, a lazy view of the stack: ``<stack>__slice_<e>``, with ``__T`` where it is transposed;
              behind it a Cast, where the chain widens: it is stored as narrow as it was
Declines when:
              the index, bounds or shape depend on an input
              something else still reads the stack whole, so that the views would be copies
              the views together hold more than the stack
Source:       mobius, torch.onnx (dynamo and TorchScript), transformers' exporter; the tests hold the spellings
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from rewriter.facts import Facts
from rewriter.facts.moves import OPERATORS
from rewriter.graph.declines import CONSTANT, NOT_WHOLE, Reason
from rewriter.graph.walk import walk
from rewriter.rule import Declined, NotApplicable, Rule
from rewriter.rules.blocks.at_operator import AtOperator
from rewriter.rules.blocks.guards import FLOATS
from rewriter.rules.blocks.readers import is_shown, origin
from rewriter.tensors import View, ViewTensor

_ENDS = tuple(sorted({*OPERATORS, "SequenceAt"} - {"SplitToSequence", "Expand", "Tile"}))


@dataclass(frozen=True)
class Readers:
    """Who reads a constant through chains of movement operators.

    Attributes:
        copied: bytes that the views at which chains end take as they would be stored, each counted once.
        whole: a node that reads the constant itself, the constant where it is a graph output, or None.
    """

    copied: int
    whole: ir.Node | ir.Value | None


class Unstack(AtOperator):
    """The rule at one movement operator."""

    def replace(self, op: Any, node: ir.Node) -> Mapping[ir.Value, ir.Value]:
        return {value: _stored(op, view) for value, view in read(self.run.facts, node).items()}


def _stored(op: Any, view: View) -> ir.Value:
    narrow = op.initializer(ViewTensor(view.unwidened))
    stored: ir.Value = narrow if view.dtype == view.unwidened.dtype else op.Cast(narrow, to=view.dtype)
    return stored


def read(facts: Facts, node: ir.Node) -> dict[ir.Value, View]:
    """Returns the outputs of a node at which chains end, each with the view that it is."""
    out = node.outputs[0]
    ends = {v: view for v in node.outputs if (view := facts.get(v, View)) is not None and _ends_at(facts, v)}
    if not ends and facts.get(out, View) is None and _selects_from_stack(facts, node):
        raise Declined(facts.why_not(out) or Reason("what it shows of the stack is not static", CONSTANT), node)
    ends = {v: view for v, view in ends.items() if view.dtype in FLOATS and _is_matrix(view)}
    if not ends:
        raise NotApplicable
    stack = origin(facts, out)
    if _refusal(facts, stack, facts.derived(stack, Readers, lambda: _readers(facts, stack))) is not None:
        refusal = _refusal(facts, stack, _readers(facts, stack))  # its readers may have gone since
        if refusal is not None:
            turned = all(view.size == _size(facts, stack) for view in ends.values())
            raise NotApplicable if turned else refusal
    return ends


def _is_matrix(view: View) -> bool:
    """Whether a view is of a stack or a matrix, or is a matrix that is stored flat."""
    return len(view.source.shape) > 1 or sum(extent > 1 for extent in view.shape) > 1


def _size(facts: Facts, stack: ir.Value) -> int:
    """Elements of a constant; a view of as many is no slice of it: the constant turned, as a tied table is."""
    view = facts.get(stack, View)
    return 0 if view is None else view.size


def _refusal(facts: Facts, stack: ir.Value, readers: Readers) -> Declined | None:
    if readers.whole is not None:
        return Declined(
            f"'{stack.name}' is still read whole, so its slices would be copies", readers.whole, remedy=NOT_WHOLE
        )
    stored = facts.get(stack, View)
    if stored is not None and readers.copied > stored.nbytes:
        sizes = f"take {readers.copied} bytes where it takes {stored.nbytes}"
        return Declined(f"the slices of '{stack.name}' {sizes}", stack)
    return None


def _ends_at(facts: Facts, value: ir.Value) -> bool:
    """True where no view is taken of ``value``, so that the chain ends here.

    A graph output that is a constant stays an Identity of it: nothing simpler keeps its name.
    """
    producer = value.producer()
    if producer is not None and _names_output(producer):
        return False
    uses = (use.node for use in value.uses())
    return value.is_graph_output() or any(_names_output(node) or not _is_view(facts, node) for node in uses)


def _names_output(node: ir.Node) -> bool:
    return node.op_type == "Identity" and node.outputs[0].is_graph_output()


def _is_view(facts: Facts, node: ir.Node) -> bool:
    """Whether a node only shows what it reads: a Cast only where a part is taken behind it, since what it ends is."""
    if node.op_type != "Cast":
        return any(is_shown(facts, out) for out in node.outputs)
    (out,) = node.outputs
    behind = (use.node for use in out.uses() if use.idx == 0 and use.node.op_type in OPERATORS)
    return is_shown(facts, out) and any(is_shown(facts, shown) for node in behind for shown in node.outputs)


def _selects_from_stack(facts: Facts, node: ir.Node) -> bool:
    view = facts.get(node.inputs[0], View)
    return view is not None and view.rank >= 3 and view.dtype in FLOATS


def _readers(facts: Facts, stack: ir.Value) -> Readers:
    def shown(at: ir.Value) -> list[ir.Value]:
        return [out for use in at.uses() if use.idx == 0 and _is_view(facts, use.node) for out in use.node.outputs]

    last: set[View] = set()
    for value in walk([stack], shown, limit=None):
        view = facts.get(value, View)
        if value is not stack and view is not None and (_ends_at(facts, value) or value.is_graph_output()):
            last.add(view)
    whole = [use.node for use in stack.uses() if use.idx or not _is_view(facts, use.node)]
    return Readers(
        sum(view.unwidened.nbytes for view in last), whole[-1] if whole else stack if stack.is_graph_output() else None
    )


def rule() -> list[Rule]:
    """Builds the rule, at every movement operator."""
    return [Unstack("unstack", op_type, remove_nodes=False) for op_type in _ENDS]
