"""Float weights of a block's experts, stacked as com.microsoft::MoE holds them.

E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from rewriter.rule import Declined
from rewriter.rules.blocks.block import Block, require_alike
from rewriter.rules.blocks.contents import Dense, Linear, Output
from rewriter.rules.blocks.guards import FLOATS
from rewriter.tensors import View, interleaved, joined, scaled, stacked

FloatWeights = tuple[View, View | None, View, View | None]
"""fc1, fc1_bias, fc2 and fc2_bias."""


def stack_float_weights(block: Block, node: ir.Node, *, rounds: bool) -> tuple[FloatWeights, Block]:
    """Returns fc1, fc1_bias, fc2, fc2_bias of the whole block, and the block without factors that went into them.

    Args:
        block: the block.
        node: what completes it, for the reason.
        rounds: whether factors may round the weights, since they are quantized next.
    """
    block = replace(block, experts=_of_one_width(block.experts))
    gate, gate_bias = _projection([e.gate for e in block.experts], "gate", node)
    down = [_dense(e.down, "down", node) for e in block.experts]
    require_alike(down, "down", node)
    fc2 = stacked(down)
    fc2_bias = _biases([e.bias for e in block.experts], fc2, "bias of down", node)
    fc1, fc1_bias = gate, gate_bias
    if block.experts[0].up is not None:
        up, up_bias = _projection([e.up for e in block.experts if e.up is not None], "up", node)
        if up.shape != gate.shape or up.dtype != gate.dtype:
            raise Declined(f"up is {list(up.shape)} and gate {list(gate.shape)}", node)
        if len({_elements(view) for view in (gate, up, fc2)}) < 3:
            raise Declined("two of gate, up and down are one weight, which fc1 would hold once more", node)
        fc1 = interleaved(gate, up)
        if gate_bias is not None or up_bias is not None:
            fc1_bias = interleaved(gate_bias or _zeros(gate), up_bias or _zeros(up))
    if fc2.shape[2] != gate.shape[1] or fc2.shape[1] != gate.shape[2]:
        raise Declined(f"down is {list(fc2.shape)} and gate {list(gate.shape)}", node)
    dtypes = {w.dtype for w in (fc1, fc1_bias, fc2, fc2_bias) if w is not None} | {block.x.dtype or fc1.dtype}
    if len(dtypes) != 1 or not dtypes <= FLOATS:
        raise Declined(f"x and the weights are {', '.join(sorted(d.name for d in dtypes))}", node)
    fc2, fc2_bias, block = _with_factors(block, fc2, fc2_bias, node, rounds=rounds)
    return (fc1, fc1_bias, fc2, fc2_bias), block


def _of_one_width(experts: tuple[Output, ...]) -> tuple[Output, ...]:
    """The experts with rows of zeros where others are wider: every activation makes zero of zero.

    They stay as they are where that would more than double their weights.
    """
    widths = [expert.gate.weight.sizes[0] for expert in experts]
    most = max(widths)
    dense = all(isinstance(e.down, Dense) and isinstance(e.gate.weight, Dense) for e in experts)
    if min(widths) == most or not dense or len(experts) * most > 2 * sum(widths):
        return experts
    return tuple(_widened(expert, most) for expert in experts)


def _widened(expert: Output, width: int) -> Output:
    def wide(linear: Linear) -> Linear:
        assert isinstance(linear.weight, Dense)
        bias = None if linear.bias is None else _with_zeros(linear.bias, 0, width)
        return replace(linear, weight=Dense(_with_zeros(linear.weight.view, 0, width)), bias=bias)

    assert isinstance(expert.down, Dense)
    up = None if expert.up is None else wide(expert.up)
    return replace(expert, gate=wide(expert.gate), up=up, down=Dense(_with_zeros(expert.down.view, 1, width)))


def _with_zeros(view: View, axis: int, size: int) -> View:
    """The view with zeros behind it along an axis, so that it has ``size`` positions there."""
    lacking = (*view.shape[:axis], size - view.shape[axis], *view.shape[axis + 1 :])
    if not lacking[axis]:
        return view
    one = View.whole(ir.tensor(np.zeros(1, view.dtype.numpy()), name="zeros"), "zeros")
    return joined((view, replace(one, shape=lacking, strides=(0,) * view.rank)), axis, view.name)


def _with_factors(
    block: Block, fc2: View, fc2_bias: View | None, node: ir.Node, *, rounds: bool
) -> tuple[View, View | None, Block]:
    """fc2 and its bias times what the router multiplies each expert with, and the block without that."""
    mixing = block.mixing
    half = fc2.dtype != ir.DataType.FLOAT
    rounds = rounds and fc2_bias is None
    if mixing.table is not None and half and not rounds:
        what = "weights" if fc2_bias is None else "bias"
        raise Declined(f"a factor for each expert would round its {fc2.dtype.name} {what}", node)
    factors = np.ones(len(block.experts)) if mixing.table is None else np.asarray(mixing.table.numpy(), np.float64)
    if half and rounds:
        factors, mixing = factors * mixing.scale, replace(mixing, scale=1.0)
    numbers = factors.tolist()
    bias = None if fc2_bias is None else scaled(fc2_bias, numbers)
    return scaled(fc2, numbers), bias, replace(block, mixing=mixing)


def _elements(view: View) -> tuple[object, ...]:
    """Equal for views of the same elements, in whatever order."""
    return view.source, view.offset, tuple(sorted(zip(view.strides, view.shape, strict=True)))


def _projection(linears: Sequence[Linear], what: str, node: ir.Node) -> tuple[View, View | None]:
    views = [_dense(linear.weight, what, node) for linear in linears]
    require_alike(views, what, node)
    weight = stacked(views)
    return weight, _biases([linear.bias for linear in linears], weight, f"bias of {what}", node)


def _biases(biases: Sequence[View | None], weight: View, what: str, node: ir.Node) -> View | None:
    """The biases of all experts, zeros for those that have none; None where none has."""
    present = [bias for bias in biases if bias is not None]
    if not present:
        return None
    require_alike(present, what, node)
    none = _zeros(weight).index(0, 0)
    return stacked([none if bias is None else bias for bias in biases])


def _dense(weight: object, what: str, node: ir.Node) -> View:
    if not isinstance(weight, Dense):
        raise Declined(f"{what} is quantized, and down is not", node)
    return weight.view


def _zeros(weight: View) -> View:
    return View.whole(ir.tensor(np.zeros(weight.shape[:2], weight.dtype.numpy()), name="zeros"), "zeros")
