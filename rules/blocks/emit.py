"""What the rules that fuse a block share: the operator's inputs, and its output in the shape that the block had."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from rewriter.emit import write_integers
from rewriter.facts import Facts
from rewriter.facts.shapes import fed_shape, shape_of
from rewriter.facts.size import Size
from rewriter.graph.declines import INFER_SHAPES, ONE_FLOAT_TYPE, OTHER_WEIGHTS
from rewriter.graph.walk import producers
from rewriter.operators.form import ExpertForm
from rewriter.rule import Declined, Fed
from rewriter.rules.blocks.axes import Atom, Dim, only, total
from rewriter.rules.blocks.block import Block
from rewriter.rules.blocks.movement import token_rows
from rewriter.rules.blocks.routing import Routing, computed_in
from rewriter.tensors import View


def form_of(block: Block, routing: Routing) -> ExpertForm:
    """Returns what the operator has to compute."""
    activation = block.activation
    return ExpertForm(
        k=block.k,
        activation=activation.kind.name,
        alpha=activation.alpha,
        beta=activation.beta,
        limit=math.inf if activation.limit is None else activation.limit,
        fusion=int(activation.kind.gated),
        normalize=routing.normalize,
    )


def logits_of(op: Any, facts: Facts, routing: Routing, dtype: ir.DataType, experts: int) -> Any:
    """Returns router_probs [T, E] of x's dtype, or declines: a cast would round them."""
    value = weights_of(op, facts, routing.logits, dtype, experts)
    return op.Neg(op.Softplus(op.Neg(value))) if routing.function == "log_sigmoid" else value


def logits_of_given(
    op: Any, facts: Facts, given: ir.Value, block: Block, dtype: ir.DataType
) -> tuple[ir.Value, tuple[ir.Value, int]]:
    """Returns [T, E] logits whose softmax over the chosen is ``given`` over its sum; and the weights with that sum.

    These are as ``times_total`` takes them. In half precision logits are relative to the largest, so that a weight is
    rounded by no more than a cast would.

    Args:
        op: onnxscript's builder.
        facts: what is known.
        given: [.., k] weights, none of them negative.
        block: what is mixed.
        dtype: element type of x.
    """
    router, half = block.mixing.router, dtype != ir.DataType.FLOAT
    weights = flat(op, facts, given, router.k)
    if block.mixing.stage == "unit":
        weights = op.ConstantOfShape(op.Shape(weights), value=ir.tensor(np.ones(1, np.float32)))
    if half and given.dtype != ir.DataType.FLOAT and block.mixing.stage != "unit":
        weights = op.Cast(weights, to=int(ir.DataType.FLOAT))
    chosen = flat(op, facts, router.indices, router.k)
    rows = op.Gather(op.Shape(weights), write_integers(op, [0], "rows"), axis=0)
    shape = op.Concat(rows, write_integers(op, [router.experts], "experts"), axis=0)
    if router.made or block.numbers is not None:  # an expert may be there twice, or be none
        everyone = _each_weight(op, facts, shape, chosen, weights, block)
        return _logarithms(op, facts, everyone, dtype), (everyone, 0)
    total = (weights, 0) if block.mixing.stage == "unit" else (given, router.k)
    nothing = ir.tensor(np.array([_nothing(dtype)], dtype.numpy()))
    logs = _logarithms(op, facts, weights, dtype)
    return op.ScatterElements(op.ConstantOfShape(shape, value=nothing), chosen, logs, axis=1), total


def _each_weight(op: Any, facts: Facts, shape: ir.Value, chosen: ir.Value, weights: ir.Value, block: Block) -> ir.Value:
    """The weight of each of the block's experts."""
    if facts.opset < 16 and block.mixing.router.made:
        raise Declined(f"ScatterElements of opset {facts.opset} adds nothing up", block.mixing.router.indices)
    nothing = ir.tensor(np.array([0.0], np.float32))
    added = {"reduction": "add"} if block.mixing.router.made else {}
    everyone: ir.Value = op.ScatterElements(op.ConstantOfShape(shape, value=nothing), chosen, weights, axis=1, **added)
    if block.numbers is not None:
        everyone = op.Gather(everyone, write_integers(op, block.numbers, "those_that_are_experts"), axis=1)
    return everyone


def _logarithms(op: Any, facts: Facts, weights: ir.Value, dtype: ir.DataType) -> ir.Value:
    least = op.initializer(ir.tensor(np.float32(_nothing(dtype)), name="no_weight"))
    logs: ir.Value = op.Max(op.Log(weights), least)
    if dtype != ir.DataType.FLOAT:
        logs = op.Cast(op.Sub(logs, _largest(op, facts, logs)), to=int(dtype))
    return logs


def _nothing(dtype: ir.DataType) -> float:
    """The logit of what was not chosen, or has no weight.

    It is finite, since kernels subtract logits and never choose -inf; -1e30 would be infinite in halves.
    """
    return -1e30 if dtype == ir.DataType.FLOAT else -3e4


def _largest(op: Any, facts: Facts, rows: ir.Value) -> ir.Value:
    """The maximum along the last of two dimensions."""
    if facts.opset >= 18:
        return op.ReduceMax(rows, write_integers(op, [1], "axes"))  # type: ignore[no-any-return]
    return op.ReduceMax(rows, axes=[1])  # type: ignore[no-any-return]


def times_total(
    op: Any, facts: Facts, out: ir.Value, x: ir.Value, total: tuple[ir.Value, int], block: Block
) -> ir.Value:
    """Returns the operator's output on ``x``, each token multiplied by the sum of some numbers of it.

    Args:
        op: onnxscript's builder.
        facts: what is known.
        out: the output.
        x: the tokens.
        total: the numbers, and how many of them a token has; 0 where they are [T, ..] and not [.., k].
        block: what is mixed.
    """
    held, width = total
    weights = flat(op, facts, held, width) if width else held
    newer = facts.opset >= 13
    rows = op.ReduceSum(weights, write_integers(op, [1], "axes")) if newer else op.ReduceSum(weights, axes=[1])
    dtype = facts_dtype(block)
    if (held.dtype or dtype) != dtype:
        rows = op.Cast(rows, to=int(dtype))
    product: ir.Value
    dims = shape_of(facts, x) if x is block.x else None
    if dims is None or len(dims) == 2:
        product = op.Mul(out, rows)
        return product
    hidden = block.experts[0].gate.weight.sizes[1]
    none = {"allowzero": 1} if facts.opset >= 14 else {}  # of no tokens there are 0, and not as many as features
    product = op.Reshape(op.Mul(_reshaped(op, out, (-1, hidden)), rows), op.Shape(out), **none)
    return product


def weights_of(op: Any, facts: Facts, value: ir.Value, dtype: ir.DataType, experts: int) -> Any:
    """Returns [.., E] numbers of the router as [T, E] of x's dtype, or declines: a cast would round them."""
    own = computed_in(value) or dtype
    if own != dtype and (dtype != ir.DataType.FLOAT or own == ir.DataType.DOUBLE):
        raise Declined(f"the router computes in {own.name}, and the operator takes x's {dtype.name}", value)
    value = flat(op, facts, value, experts)
    return value if own == dtype else op.Cast(value, to=int(dtype))


def flat(op: Any, facts: Facts, value: ir.Value, width: int) -> ir.Value:
    """Returns [.., width] as [T, width]; where that is 1, also [..]."""
    dims = shape_of(facts, value)
    rows = dims is not None and len(dims) == 2 and (width > 1 or dims[1] == Size(1))
    return value if rows else _reshaped(op, value, (-1, width))


def in_the_blocks_shape(
    op: Any, facts: Facts, block: Block, emit: Callable[[ir.Value], ir.Value], node: ir.Node
) -> ir.Value:
    """Returns the block's output: the operator on x, scaled, and in the shape that the block had; or declines.

    Args:
        op: onnxscript's builder.
        facts: what is known.
        block: what is replaced.
        emit: builds the operator on x.
        node: the block's last node, for reasons.
    """
    hidden = block.experts[0].gate.weight.sizes[1]
    dtype = facts_dtype(block)
    if (block.out.dtype or dtype) != dtype:
        reason = f"the experts compute in {dtype.name} and are summed in {block.out.dtype.name}"  # type: ignore[union-attr]
        raise Declined(f"{reason}; the operator returns what it computes in", node, remedy=ONE_FLOAT_TYPE)
    lead, behind = _lead(block, node)
    rows = token_rows(facts, block.x, hidden)
    if rows is None:
        raise Declined("the shape of the experts' input is unknown", block.x, remedy=INFER_SHAPES)
    own = list(rows.axes[:-1])
    if _flattened(lead) != _flattened(own):
        raise Declined("the rows of the sum are not those of the experts' input", node)
    scale = block.mixing.scale
    if scale != 1 and dtype != ir.DataType.FLOAT:
        raise Declined(f"the weights are scaled by {scale:g}, which rounds in {dtype.name}", node, remedy=OTHER_WEIGHTS)
    shape: list[int] = []
    units = lead[len(own) :]
    if lead[: len(own)] != own or any(units) or rows.rank not in (2, 3):
        shape = [_extent(dim) for dim in lead]
        if shape.count(-1) > 1:
            raise Declined("the rows of the sum lie otherwise than those of the experts' input", node)
        out = emit(flat(op, facts, block.x, hidden))
        shape = [] if shape == [-1] else [*shape, hidden]
    else:
        out = emit(block.x)
        shape = [*(0 for _ in own), *(1 for _ in units), hidden] if units else []
    if scale != 1:
        out = op.Mul(out, op.initializer(ir.tensor(np.array(scale, np.float32), name="scale")))
    if behind:
        shape = [*(shape or [*(0 for _ in lead), hidden]), *(1 for _ in behind)]
    out = _reshaped(op, out, shape) if shape else out
    out = out if block.mixing.times is None else op.Mul(out, block.mixing.times)
    for start in block.starts:
        out = op.Add(start, out)
    return out


def unflattened(facts: Facts, block: Block) -> Block:
    """Returns the block on its tokens as they were before they were flattened, where these lie as the sum does."""
    source = next(iter(producers(block.x)), None)
    moved, rows = block.x.producer(), None if source is None else token_rows(facts, source)
    if source is None or rows is None or moved is None or moved.op_type != "Reshape" or rows.rank < 3:
        return block
    return replace(block, experts=tuple(e.on(source) for e in block.experts)) if rows.axes == block.axes else block


def _lead(block: Block, node: ir.Node) -> tuple[list[Dim], Sequence[Dim]]:
    """The dimensions before and behind the features."""
    features = [i for i, dim in enumerate(block.axes) if only(dim, "feature")]
    if len(features) != 1 or any(block.axes[features[0] + 1 :]):
        raise Declined("the features of the sum are not its last dimension", node)
    return list(block.axes[: features[0]]), block.axes[features[0] + 1 :]


def _flattened(dims: Sequence[Dim]) -> list[Atom]:
    return [atom for dim in dims for atom in dim]


def _extent(dim: Dim) -> int:
    constant = total(dim).constant
    return -1 if constant is None else constant


def _reshaped(op: Any, value: ir.Value, shape: Sequence[int]) -> ir.Value:
    moved: ir.Value = op.Reshape(value, write_integers(op, shape, "rows_shape"))
    return moved


def facts_dtype(block: Block) -> ir.DataType:
    """Returns the element type of x."""
    if block.x.dtype is not None:
        return block.x.dtype
    weight = block.experts[0].gate.weight
    return weight.dtype


def proof_inputs(facts: Facts, block: Block, routing: Routing, nodes: Iterable[ir.Node]) -> dict[ir.Value, Fed]:
    """Returns what the proof needs to know of the values that the block's nodes read."""
    dtype = facts_dtype(block)
    scores = block.mixing.router.scores
    positive = {routing.weights, routing.given} | ({scores.logits} if scores.function == "positive" else set())
    fed = {}
    for value in dict.fromkeys((block.x, *routing.read, *block.beside)):
        dims = shape_of(facts, value)
        if dims is None or (value.is_graph_input() and value.dtype is None):
            continue
        router = block.mixing.router
        if value is router.indices:  # a table's: the tokens' numbers are none of the block's
            fed[value] = Fed(value.dtype or ir.DataType.INT64, fed_shape(dims), below=router.experts)
            continue
        width = router.k if value is routing.given else router.experts
        width = block.experts[0].gate.weight.sizes[1] if value in (block.x, *block.starts) else width
        width = 1 if value is block.mixing.times else width
        sizes = (*dims[:-1], Size(width))
        fed[value] = Fed(
            value.dtype or dtype,
            fed_shape(sizes),
            chosen=block.mixing.router.k if value is routing.logits else 0,
            positive=value in positive,
        )
    shaped = dict.fromkeys(v for node in nodes if node.op_type == "Shape" for v in node.inputs if v is not None)
    for value in shaped:  # as many rows as the tokens have, where these are made of it
        dims = shape_of(facts, value)
        if dims is not None and value.dtype is not None and facts.get(value, View) is None:
            fed.setdefault(value, Fed(value.dtype, fed_shape(dims)))
    return fed
