"""Who reads a constant, directly or through movement operators that only show parts of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import onnx_ir as ir

from rewriter.facts import Facts
from rewriter.facts.integers import static
from rewriter.graph.attributes import integer_attribute, integers_attribute
from rewriter.graph.declines import stays_float
from rewriter.tensors import View


class Use(NamedTuple):
    """A node that reads a value, and at which input."""

    node: ir.Node
    idx: int


def origin(facts: Facts, value: ir.Value) -> ir.Value:
    """Returns the constant that a chain of movement operators, which ends in ``value``, begins with."""
    while (producer := value.producer()) is not None and producer.op_type != "Constant":
        source = producer.inputs[0]
        if source is None or facts.get(source, View) is None:
            break
        value = source
    return value


def readers(facts: Facts, value: ir.Value) -> Iterator[Use]:
    """Yields every use of the constant behind ``value``, or of a view of it, that is not itself a view of it.

    Raises:
        Declined: the constant, or a view of it, is a graph output.
    """
    root = origin(facts, value)
    pending = [root]
    while pending:
        shown = pending.pop()
        if shown.is_graph_output():
            raise stays_float(shown)
        for use in shown.uses():
            if use.idx == 0 and use.node.op_type != "Shape" and facts.get(use.node.outputs[0], View) is not None:
                pending.extend(use.node.outputs)
            else:
                yield Use(*use)


def require_one_reader(facts: Facts, weight: ir.Value, node: ir.Node) -> None:
    """Declines where the weight would stay in the model beside what replaces it."""
    for use in readers(facts, weight):
        if use.node is not node:
            raise stays_float(use.node)


def reads_rows(use: Use) -> bool:
    """True where the node looks up rows by an index: a Gather along the first axis, or a GatherND."""
    if use.idx != 0 or use.node.domain not in ("", "ai.onnx"):
        return False
    return use.node.op_type == "GatherND" or (use.node.op_type == "Gather" and gathers_rows(use.node))


def gathers_rows(node: ir.Node) -> bool:
    """True where a Gather picks along the first axis."""
    axis = integer_attribute(node, "axis", 0)
    table = node.inputs[0]
    return axis == 0 or (table is not None and table.shape is not None and axis == -table.shape.rank())


def contracted_axis(facts: Facts, value: ir.Value, rank: int) -> int:
    """Returns which of the last two axes of ``value`` a matrix product sums over: -1 or -2; -1 where nothing tells."""
    pending: list[tuple[ir.Value, list[int]]] = [(value, list(range(-rank, 0)))]
    while pending:
        shown, axes = pending.pop()
        for use in shown.uses():
            summed = _summed(Use(*use), axes)
            if summed is not None:
                return summed if summed in (-1, -2) else -1
            moved = _moved(facts, Use(*use), axes)
            if moved is not None:
                pending.append((use.node.outputs[0], moved))
    return -1


def _summed(use: Use, axes: Sequence[int]) -> int | None:
    """The axis that the use sums over, or None where it is no product of matrices."""
    node = use.node
    if len(axes) < 2 or use.idx > 1 or node.op_type not in ("MatMul", "Gemm"):
        return None
    transposed = node.op_type == "Gemm" and integer_attribute(node, "transB" if use.idx else "transA", 0)
    return axes[-2] if (use.idx == 1) != bool(transposed) else axes[-1]


def _moved(facts: Facts, use: Use, axes: Sequence[int]) -> list[int] | None:
    """Where the axes lie behind a movement operator; None where it is another operator."""
    node = use.node
    if use.idx:
        return None
    match node.op_type:
        case "Identity" | "Cast":
            return list(axes)
        case "Transpose":
            return [axes[p] for p in integers_attribute(node, "perm", range(len(axes))[::-1])]
        case "Unsqueeze":
            new = static(facts, node, 1, "axes")
            rank = len(axes) + len(new or ())
            kept = iter(axes)
            return None if new is None else [0 if i in {a % rank for a in new} else next(kept) for i in range(rank)]
        case "Squeeze":
            gone = static(facts, node, 1, "axes")
            return None if gone is None else [a for i, a in enumerate(axes) if i not in {g % len(axes) for g in gone}]
    return None
