"""Three attention projections of one input -> one packed projection, where the plan gives them one form.

Matched:      MatMul, Gemm or MatMulNBits [, Add] three times on one x: q, k and v of one attention
Replacement:  one of the same operator [, Add] on their constants one after another, byte for byte, and a Split; where
              a GroupQueryAttention alone reads the three, it takes them packed
Declines when:
              the three differ in operator, attributes (bits, block), symmetry, bias or type
              the plan gives them different forms
              x has more than one of a kind, or an operand is not constant
              the opset is below 13 and a Split is needed
Source:       ONNX Runtime's builder packs so; mobius and torch.onnx write the three apart
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from rewriter.emit import write_integers
from rewriter.graph.attributes import integer_attribute
from rewriter.rule import Declined, NotApplicable, Replacement, Rule, Run
from rewriter.rules.blocks.at_operator import AtOperator
from rewriter.rules.blocks.qkv import LINEARS, ROLES, Projection, attend, attention_feeds, read_projection, specs, write
from rewriter.rules.blocks.tied import weight_of
from rewriter.tensors import View, ViewTensor, joined

_SPLIT_TAKES_LENGTHS = 13


class PackQKV(AtOperator):
    """The rule at one operator, where that is q."""

    def replace(self, op: Any, node: ir.Node) -> Replacement:
        three = read(self.run, node)
        first = three[0]
        operands = {}
        for slot, (view, axis) in first.operands.items():
            packed = joined([p.operands[slot][0] for p in three], axis, _name(view))
            operands[slot] = op.initializer(ViewTensor(packed), name=_name(view))
        bias = None
        if first.bias is not None:
            shown = [p.bias[1] for p in three if p.bias is not None]
            packed = joined(shown, first.bias[2], _name(shown[0]))
            bias = op.initializer(ViewTensor(packed), name=_name(shown[0]))
        product, out = write(op, first, operands, bias, sum(p.n for p in three))
        covers = [node for p in three for node in p.nodes]
        roles = {product: "attention.qkv"}
        attention = _attention(three)
        if attention is not None:
            head = three[1].n // integer_attribute(attention, "kv_num_heads", 1)
            fed = attention_feeds(attention, first.x, head)
            new = attend(op, attention, [out, None, None])
            return Replacement(new, [*covers, attention], fed=fed, roles=roles)
        if node.graph is not None and node.graph.opset_imports.get("", _SPLIT_TAKES_LENGTHS) < _SPLIT_TAKES_LENGTHS:
            raise Declined("the model's opset has no Split with lengths as an input", node)
        lengths = write_integers(op, [p.n for p in three], "lengths")
        taken = op.Split(out, lengths, axis=-1, _outputs=3)
        return Replacement(dict(zip((p.out for p in three), taken, strict=True)), covers, roles=roles)


def read(run: Run, node: ir.Node) -> tuple[Projection, Projection, Projection]:
    """Reads q at ``node``, and k and v beside it, or declines."""
    if run.role(node).name != ROLES[0] or node.inputs[0] is None:
        raise NotApplicable
    layer = run.role(node).layer
    found: dict[str, list[ir.Node]] = {role: [] for role in ROLES}
    for use in node.inputs[0].uses():
        role = run.role(use.node)
        if use.idx == 0 and role.layer == layer and role.name in found and use.node.graph is node.graph:
            found[role.name].append(use.node)
    if any(len(nodes) != 1 for nodes in found.values()):
        counts = ", ".join(f"{len(nodes)} of {role}" for role, nodes in found.items())
        raise Declined(f"its input is read by {counts}; one of each is packed", node)
    q, k, v = (read_projection(run.facts, found[role][0]) for role in ROLES)
    for other in (k, v):
        if other.form != q.form:
            raise Declined("q, k and v differ in operator, attributes, type or bias", other.node)
    weights = [(weight, p.node) for p in (q, k, v) if (weight := weight_of(run.facts, p.node)) is not None]
    if weights and len(set(specs(run, weights))) > 1:
        raise Declined("the plan gives q, k and v different forms", node)
    return q, k, v


def _attention(three: Sequence[Projection]) -> ir.Node | None:
    """Returns the GroupQueryAttention that alone reads the three, as q, k and v; or None."""
    readers = []
    for slot, projection in enumerate(three):
        uses = list(projection.out.uses())
        if len(uses) != 1 or uses[0].idx != slot or projection.out.is_graph_output():
            return None
        readers.append(uses[0].node)
    node = readers[0]
    heads, shared = integer_attribute(node, "num_heads", 0), integer_attribute(node, "kv_num_heads", 0)
    if node.op_type != "GroupQueryAttention" or len(set(readers)) > 1 or not heads or not shared:
        return None
    size = three[0].n // heads
    return node if [p.n for p in three] == [heads * size, shared * size, shared * size] else None


def _name(view: View) -> str:
    return view.name.removesuffix("_q") if view.name.endswith("_q") else f"{view.name}_qkv"


def rule() -> list[Rule]:
    """Builds the rule, at each operator."""
    return [PackQKV("pack-qkv", op_type, domain, remove_nodes=False) for domain, op_type in LINEARS]
