"""What the rules on packed attention projections share: a linear whose output features can be cut or joined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from rewriter.facts import Facts
from rewriter.graph.attributes import integer_attribute
from rewriter.graph.declines import CONSTANT, INLINE
from rewriter.operators.matmul_nbits import MATMUL_NBITS
from rewriter.operators.operator import DOMAIN
from rewriter.quantize.types import WeightSpec
from rewriter.rule import Declined, Fed, Run
from rewriter.rules.blocks.tied import weight_of
from rewriter.tensors import View

LINEARS = (("", "MatMul"), ("", "Gemm"), (DOMAIN, MATMUL_NBITS.name))
ROLES = ("attention.q", "attention.k", "attention.v")

_QUANTIZED_SLOTS = (1, 2, 3, 5)
_G_IDX = 4


@dataclass(frozen=True)
class Projection:
    """A linear with constant operands, and the constant that is added to it.

    Attributes:
        node: the MatMul, Gemm or MatMulNBits.
        x: [.., K].
        operands: input slot -> the constant, and its axis of output features.
        add: the Add of a bias, or None.
        bias: slot in the Add, the constant, and its axis of output features; or None.
        out: [.., N], bias included.
        n: output features.
    """

    node: ir.Node
    x: ir.Value
    operands: Mapping[int, tuple[View, int]]
    add: ir.Node | None
    bias: tuple[int, View, int] | None
    out: ir.Value
    n: int

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """The linear and its Add."""
        return (self.node,) if self.add is None else (self.node, self.add)

    @property
    def form(self) -> object:
        """Equal for projections that can be joined."""
        attributes = tuple(sorted((a.name, repr(a.value)) for a in self.node.attributes.values() if a.name != "N"))
        operands = [(slot, view.dtype, _other(view, axis), axis) for slot, (view, axis) in self.operands.items()]
        bias = None if self.bias is None else (self.bias[0], self.bias[1].dtype, self.bias[1].rank)
        return self.x, self.node.op_type, attributes, tuple(operands), bias


def read_projection(facts: Facts, node: ir.Node) -> Projection:
    """Reads the linear ``node`` and its bias, or declines."""
    x, out = node.inputs[0], node.outputs[0]
    if x is None or any(a.is_ref() for a in node.attributes.values()):
        raise Declined("an attribute is set by the caller of a function", node, remedy=INLINE)
    operands = _quantized(facts, node) if node.op_type == MATMUL_NBITS.name else _float(facts, node)
    view, axis = operands[1]
    n = view.shape[axis]
    uses = list(out.uses())
    add = uses[0].node if len(uses) == 1 and not out.is_graph_output() else None
    if add is None or add.op_type != "Add" or add.domain not in ("", "ai.onnx"):
        return Projection(node, x, operands, None, None, out, n)
    slot = 1 - uses[0].idx
    bias = facts.get(add.inputs[slot], View)
    if bias is None or not bias.rank or bias.size != n or bias.shape[-1] != n:
        return Projection(node, x, operands, None, None, out, n)
    return Projection(node, x, operands, add, (slot, bias, bias.rank - 1), add.outputs[0], n)


def write(
    op: Any, like: Projection, operands: Mapping[int, ir.Value], bias: ir.Value | None, n: int
) -> tuple[Any, Any]:
    """Writes a projection of ``n`` output features; returns what the linear and what its Add computes."""
    inputs = [operands.get(slot) if slot in like.operands else value for slot, value in enumerate(like.node.inputs)]
    attributes = {a.name: a.value for a in like.node.attributes.values()}
    if "N" in attributes:
        attributes["N"] = n
    product = getattr(op, like.node.op_type)(*inputs, _domain=like.node.domain, **attributes)
    if like.bias is None:
        return product, product
    return product, op.Add(*((bias, product) if like.bias[0] == 0 else (product, bias)))


def specs(run: Run, weights: Sequence[tuple[View, ir.Node]]) -> list[WeightSpec | None]:
    """Returns what the plan says of q, k and v as [N, K] weights; None where it keeps one in float."""
    found: list[WeightSpec | None] = []
    for role, (view, node) in zip(ROLES, weights, strict=True):
        try:
            found.append(run.quantize(view, node, role=role).context.spec)
        except Declined:
            found.append(None)
    return found


def attend(op: Any, attention: ir.Node, taken: Sequence[ir.Value | None]) -> dict[ir.Value, ir.Value]:
    """Writes the attention anew, on other q, k and v; returns old output -> new output."""
    attributes = {a.name: a.value for a in attention.attributes.values()}
    count = len(attention.outputs)
    inputs = [*taken, *attention.inputs[3:]]
    made = getattr(op, attention.op_type)(*inputs, _domain=attention.domain, _outputs=count, **attributes)
    return dict(zip(attention.outputs, [made] if count == 1 else made, strict=True))


def attention_feeds(node: ir.Node, x: ir.Value, head: int) -> dict[ir.Value, Fed]:
    """Says what a GroupQueryAttention can take, so that it can be run: lengths that fit the cache."""
    assert x.dtype is not None
    slides = integer_attribute(node, "sliding_window_cache", 0)
    window = integer_attribute(node, "local_window_size", -1) if slides else 0
    one, length, past = (1, ()), (1, ("length",)), (window, ()) if window else (1, ("past",))
    names = ("length",) if window else ("past", "length")
    depth = x.shape[-1] if x.shape is not None else None
    cache = Fed(x.dtype, (one, (integer_attribute(node, "kv_num_heads", 0), ()), past, (head, ())))
    told: dict[int, Fed] = {3: cache, 4: cache}
    for slot, rank, plus in ((5, 1, window - 1), (6, 0, window)):
        value = node.inputs[slot] if slot < len(node.inputs) else None
        if value is not None:
            known = rank if value.shape is None else value.shape.rank()
            told[slot] = Fed(ir.DataType.INT32, (one,) * known, total=names, plus=plus)
    fed = {v: told[slot] for slot, v in enumerate(node.inputs) if v is not None and slot in told}
    return fed | ({x: Fed(x.dtype, (one, length, (depth, ())))} if isinstance(depth, int) else {})


def _float(facts: Facts, node: ir.Node) -> dict[int, tuple[View, int]]:
    weight = facts.get(node.inputs[1], View)
    if weight_of(facts, node) is None or weight is None:
        raise Declined("the weight is not one constant matrix", node)
    if node.op_type == "MatMul":
        return {1: (weight, 1)}
    operands = {1: (weight, 0 if integer_attribute(node, "transB", 0) else 1)}
    c = node.inputs[2] if len(node.inputs) > 2 else None
    if c is None:
        return operands
    bias = facts.get(c, View)
    n = weight.shape[operands[1][1]]
    if bias is None or not bias.rank or bias.size != n or bias.shape[-1] != n:
        raise Declined("what the Gemm adds is not a constant of one number for each output", c)
    return operands | {2: (bias, bias.rank - 1)}


def _quantized(facts: Facts, node: ir.Node) -> dict[int, tuple[View, int]]:
    if integer_attribute(node, "weight_prepacked", 0):
        raise Declined("the weight is in a kernel's own layout, which mixes output features", node)
    if len(node.inputs) > _G_IDX and node.inputs[_G_IDX] is not None:
        raise Declined("it has a g_idx", node)
    n = integer_attribute(node, "N", 0)
    operands = {}
    for slot in _QUANTIZED_SLOTS:
        value = node.inputs[slot] if slot < len(node.inputs) else None
        view = facts.get(value, View)
        if value is not None and (view is None or not n or view.size % n):
            raise Declined("an operand is not constant, or of another size than N", value, remedy=CONSTANT)
        if view is not None:
            operands[slot] = (view if view.rank and view.shape[0] == n else view.reshape((n, view.size // n)), 0)
    return operands


def _other(view: View, axis: int) -> tuple[int, ...]:
    return (*view.shape[:axis], *view.shape[axis + 1 :])
