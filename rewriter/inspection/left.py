"""What stays float in a rewritten model, and why: the rule that declined there, or what no rule reads."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import onnx_ir as ir

from rewriter.graph.contents import Slot, all_nodes, name_of, stored_tensors, subgraphs
from rewriter.graph.declines import INLINE, ONE_OPSET, Reason
from rewriter.graph.walk import walk
from rewriter.inspection.kinds import is_bias, quantization
from rewriter.inspection.weights import MOVES, RoleOf, operators, role_of_tensor
from rewriter.io.functions import operators_of_another_opset
from rewriter.quantize.job import PartTensor
from rewriter.report import Decline, Left
from rewriter.ruleset import RuleSet
from rewriter.tensors import constant
from rewriter.text import natural

Use = tuple[ir.Node, int]


def left_in_float(
    model: ir.Model, declines: Iterable[Decline], role_of: RoleOf, rule_set: RuleSet, other: RuleSet
) -> tuple[Left, ...]:
    """Returns the matrices and stacks of matrices that stay float, the largest first.

    Biases, scales and zero points are none of them.

    Args:
        model: as rewritten.
        declines: of the run; the last at a node tells why, since what quantizes comes late.
        role_of: the role of a node; an unnamed role where it has none.
        rule_set: what was run.
        other: what to point to where no rule of that reads a weight.
    """
    by_node = {decline.node: decline for decline in declines}
    fixed = _fixed(model)
    found = []
    for slot in stored_tensors(model):
        tensor = slot.tensor
        if not tensor.dtype.is_floating_point() or len(tensor.shape) < 2 or isinstance(tensor, PartTensor):
            continue
        if is_bias(slot) or quantization(slot)[1]:
            continue
        near, last = _readers(slot, fixed)
        why = next((by_node[name_of(node)] for node in near if name_of(node) in by_node), None)
        reason = _unread(model, last, rule_set, other) if why is None else Reason(why.reason, why.remedy)
        found.append(
            Left(
                name=slot.key if isinstance(slot.owner, ir.Value) else name_of(slot.owner),
                role=role_of_tensor(slot, role_of).name,
                nbytes=tensor.nbytes,
                readers=operators(slot),
                rule=why.rule if why else "",
                reason=str(reason),
                remedy=reason.remedy,
            )
        )
    return tuple(sorted(found, key=lambda left: (-left.nbytes, natural(left.name))))


def _fixed(model: ir.Model) -> set[ir.Value]:
    """The values that are computed from constants alone."""
    found = {v for graph in model.graphs() for v in graph.initializers.values() if constant(v) is not None}
    for node in all_nodes(model):
        if node.op_type == "Constant" or (node.inputs and not subgraphs(node) and _is_fixed(node, found)):
            found.update(node.outputs)
    return found


def _is_fixed(node: ir.Node, fixed: Collection[ir.Value]) -> bool:
    return all(value is None or value in fixed for value in node.inputs)


def _readers(slot: Slot, fixed: Collection[ir.Value]) -> tuple[Sequence[ir.Node], Sequence[ir.Node]]:
    """The nodes that read a tensor, what is moved of it or what constants make of it; and which of them last.

    Last is what reads an input beside it: where it looks rows up, what reads these is of the first, not of the last.
    """
    owner = slot.owner
    if isinstance(owner, ir.Node) and owner.op_type != "Constant":
        return [owner], [owner]

    def behind(use: Use) -> list[Use]:
        node, position = use
        shows = (position == 0 and node.op_type in MOVES) or _is_fixed(node, fixed)
        return [found for value in node.outputs for found in value.uses()] if shows else []

    whole = owner.outputs[0] if isinstance(owner, ir.Node) else owner
    first: Iterable[Use] = whole.uses()
    uses = list(walk(first, behind, limit=None))
    shown = {whole, *fixed}
    return [node for node, _ in uses], [n for n, at in uses if n.inputs[at] in shown and not _is_fixed(n, fixed)]


def _unread(model: ir.Model, nodes: Sequence[ir.Node], rule_set: RuleSet, other: RuleSet) -> Reason:
    """Why no rule came near a weight that these nodes read."""
    if not nodes:
        return Reason("it is no part of a product or a lookup: only constants, or a caller, read it")
    for node in nodes:
        function = model.functions.get(node.op_identifier())
        if function is not None:
            others = operators_of_another_opset(model, function)
            which = f", whose {', '.join(others)} mean something else in the opset of the model" if others else ""
            called = f"a call of function {node.domain}::{node.op_type} reads it"
            return Reason(f"{called}{which}", ONE_OPSET if others else INLINE)
    if not rule_set.quantizes:
        return Reason(f"rule set {rule_set.name} quantizes nothing")
    operator = (nodes[0].domain, nodes[0].op_type)
    if rule_set.reads(operator):
        return Reason(f"the rules of {rule_set.name} at {operator[1]} are about other constants")
    remedy = f"rule set {other.name} does" if other.reads(operator) else ""
    return Reason(f"no rule of {rule_set.name} reads {operator[1]}", remedy)
