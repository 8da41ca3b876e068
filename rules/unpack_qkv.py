"""A packed attention projection -> three, where the plan gives q, k and v different forms.

Matched:      MatMul, Gemm or MatMulNBits [, Add] whose output features are q, k and v, read by a Split, by three Slices
              or by a GroupQueryAttention that takes them packed
Replacement:  three of the same operator [, Add] on slices of its constants, byte for byte; the Split or the Slices go,
              the GroupQueryAttention reads the three
Declines when:
              (silently) the plan gives q, k and v one form, or it is quantized already; unless ``when`` is always
              an operand is not constant, or in a layout that mixes output features
              something else reads the packed output, or the lengths of q, k and v are not constant
              something else reads the packed weight, which would stay in the model beside its parts
Source:       packed projections of ONNX Runtime's builder; mixed precision as llama.cpp's Q4_K_M
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import onnx_ir as ir

from rewriter.facts.integers import static
from rewriter.graph.attributes import integer_attribute
from rewriter.graph.declines import stays_float
from rewriter.operators.matmul_nbits import MATMUL_NBITS
from rewriter.rule import Declined, NotApplicable, Replacement, Rule, Run
from rewriter.rules.blocks.at_operator import AtOperator
from rewriter.rules.blocks.qkv import LINEARS, ROLES, Projection, attend, attention_feeds, read_projection, specs, write
from rewriter.rules.blocks.readers import readers
from rewriter.rules.blocks.tied import inputs_of, weight_of
from rewriter.tensors import ViewTensor

When = Literal["mixed", "always"]


@dataclass(frozen=True)
class Packed:
    """A packed projection and who takes it apart.

    Attributes:
        projection: q, k and v, one after another.
        lengths: output features of each.
        outs: what takes the place of q, k and v; empty where the attention takes them packed.
        readers: the Split or the Slices, or the GroupQueryAttention.
    """

    projection: Projection
    lengths: tuple[int, int, int]
    outs: tuple[ir.Value, ...]
    readers: tuple[ir.Node, ...] = field(default_factory=tuple)


class UnpackQKV(AtOperator):
    """The rule at one operator."""

    def __init__(self, domain: str, op_type: str, when: When) -> None:
        super().__init__("unpack-qkv", op_type, domain, remove_nodes=False)
        self._when = when

    def replace(self, op: Any, node: ir.Node) -> Replacement:
        packed = read(self.run, node, self._when)
        projection = packed.projection
        products, outs, start = [], [], 0
        for letter, n in zip("qkv", packed.lengths, strict=True):
            pieces = {}
            for slot, (view, axis) in projection.operands.items():
                piece = ViewTensor(view.slice(axis, start, n))
                pieces[slot] = op.initializer(piece, name=f"{view.name}_{letter}")
            bias = None
            if projection.bias is not None:
                _, view, axis = projection.bias
                bias = op.initializer(ViewTensor(view.slice(axis, start, n)), name=f"{view.name}_{letter}")
            product, out = write(op, projection, pieces, bias, n)
            products.append(product)
            outs.append(out)
            start += n
        roles = dict(zip(products, ROLES, strict=True))
        if packed.outs:
            new = dict(zip(packed.outs, outs, strict=True))
            return Replacement(new, (*projection.nodes, *packed.readers), roles=roles)
        (attention,) = packed.readers
        head = packed.lengths[1] // integer_attribute(attention, "kv_num_heads", 1)
        fed = attention_feeds(attention, projection.x, head)
        return Replacement(attend(op, attention, outs), (*projection.nodes, attention), fed=fed, roles=roles)


def read(run: Run, node: ir.Node, when: When) -> Packed:
    """Reads the packed projection at ``node``, or declines."""
    if run.role(node).name != "attention.qkv":
        raise NotApplicable
    if node.op_type == MATMUL_NBITS.name and when == "mixed":
        raise NotApplicable
    projection = read_projection(run.facts, node)
    packed = _by_attention(projection) or _by_split(run, projection) or _by_slices(run, projection)
    if packed is None:
        raise Declined("its output is not just taken apart into q, k and v", projection.out)
    for use in readers(run.facts, inputs_of(node)[1]):
        if use.node is not node:
            raise stays_float(use.node, "the packed weight")
    weight = weight_of(run.facts, node)
    if when == "mixed" and weight is not None:
        q, k, _ = packed.lengths
        starts = (0, q, q + k)
        parts = [(weight.slice(0, s, n), node) for s, n in zip(starts, packed.lengths, strict=True)]
        if len(set(specs(run, parts))) == 1:
            raise NotApplicable
    return packed


def _by_attention(projection: Projection) -> Packed | None:
    uses = list(projection.out.uses())
    if len(uses) != 1 or uses[0].idx or projection.out.is_graph_output():
        return None
    node = uses[0].node
    if node.op_type != "GroupQueryAttention" or any(value is not None for value in node.inputs[1:3]):
        return None
    heads, shared = integer_attribute(node, "num_heads", 0), integer_attribute(node, "kv_num_heads", 0)
    if not heads or not shared or projection.n % (heads + 2 * shared):
        return None
    size = projection.n // (heads + 2 * shared)
    return Packed(projection, (heads * size, shared * size, shared * size), (), (node,))


def _by_split(run: Run, projection: Projection) -> Packed | None:
    uses = list(projection.out.uses())
    if len(uses) != 1 or uses[0].node.op_type != "Split" or projection.out.is_graph_output():
        return None
    node = uses[0].node
    n, count = projection.n, len(node.outputs)
    lengths = static(run.facts, node, 1, "split", [n // count] * count if n % count == 0 else [])
    if not _is_last(projection.out, integer_attribute(node, "axis", 0)) or lengths is None or len(lengths) != 3:
        return None
    q, k, v = lengths
    return Packed(projection, (q, k, v), tuple(node.outputs), (node,)) if q + k + v == n else None


def _by_slices(run: Run, projection: Projection) -> Packed | None:
    nodes = [use.node for use in projection.out.uses() if use.node.op_type == "Slice" and use.idx == 0]
    if len(nodes) != 3 or len(list(projection.out.uses())) != 3 or projection.out.is_graph_output():
        return None
    bounds = []
    for node in nodes:
        starts, ends = static(run.facts, node, 1, "starts"), static(run.facts, node, 2, "ends")
        axes, steps = static(run.facts, node, 3, "axes", []), static(run.facts, node, 4, "", [1])
        if not starts or not ends or not axes or len(axes) != 1 or steps != [1]:
            return None
        if not _is_last(projection.out, axes[0]):
            return None
        shown = range(*slice(starts[0], ends[0]).indices(projection.n))
        bounds.append((shown.start, shown.stop, node))
    bounds.sort(key=lambda bound: bound[:2])
    (a, b, first), (c, d, second), (e, f, third) = bounds
    if (a, b, d, f) != (0, c, e, projection.n):
        return None
    readers = (first, second, third)
    return Packed(projection, (b - a, d - c, f - e), tuple(node.outputs[0] for node in readers), readers)


def _is_last(value: ir.Value, axis: int) -> bool:
    return axis == -1 or (value.shape is not None and axis == value.shape.rank() - 1)


def rule(*, when: When = "mixed") -> list[Rule]:
    """Builds the rule, at each operator.

    Args:
        when: mixed unpacks where the plan gives q, k and v different forms; always, wherever it can.
    """
    return [UnpackQKV(domain, op_type, when) for domain, op_type in LINEARS]
