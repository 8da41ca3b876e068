"""MatMulNBits weights of a block's experts, stacked as com.microsoft::QMoE holds them: codes byte for byte.

E experts, N output features, K input features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from rewriter.graph.declines import OTHER_BLOCK_SIZE, no_kernel
from rewriter.operators.form import ExpertForm
from rewriter.operators.qmoe import QMOE, RAW
from rewriter.quantize.types import QuantizedShape
from rewriter.rule import Declined, Run
from rewriter.rules.blocks.block import Block, require_alike
from rewriter.rules.blocks.contents import Packed, Weight
from rewriter.rules.blocks.qmoe import KernelChoice, exact_kernels, refusal
from rewriter.rules.blocks.routing import Routing
from rewriter.tensors import View, interleaved, scaled, stacked


@dataclass(frozen=True)
class QuantizedProjection:
    """One projection of all experts, as QMoE holds it.

    Attributes:
        codes: [E, N, K * bits / 8].
        scales: [E, N, K / block].
        zero_points: [E, N, ceil(K / block * bits / 8)], or None.
        bias: [E, N], or None.
        shape: of one expert's weight.
    """

    codes: View
    scales: View
    zero_points: View | None
    bias: View | None
    shape: QuantizedShape


def stack_quantized_weights(block: Block, node: ir.Node) -> tuple[QuantizedProjection, QuantizedProjection]:
    """Returns fc1 and fc2 of the whole block; declines where QMoE cannot hold them together."""
    own = block.experts
    fc1 = _stack([e.gate.weight for e in own], [e.gate.bias for e in own], "gate", node)
    fc2 = _stack([e.down for e in own], [e.bias for e in own], "down", node)
    if own[0].up is not None:
        ups = [e.up for e in own if e.up is not None]
        up = _stack([u.weight for u in ups], [u.bias for u in ups], "up", node)
        if up.shape != fc1.shape:
            raise Declined("gate and up are quantized in different ways", node)
        fc1 = _in_turn(fc1, up)
    if (fc1.shape.bits, fc1.shape.block) != (fc2.shape.bits, fc2.shape.block):
        raise Declined(
            "QMoE has one width and one block size for all projections, and these have several",
            node,
            remedy=OTHER_BLOCK_SIZE,
        )
    dtypes = {v.dtype for p in (fc1, fc2) for v in (p.scales, p.bias) if v is not None}
    if len(dtypes | {block.x.dtype or fc1.scales.dtype}) != 1:
        raise Declined("x, the scales and the biases have different types", node)
    table = block.mixing.table
    if table is None:
        return fc1, fc2
    if fc2.scales.dtype != ir.DataType.FLOAT:
        raise Declined(f"a factor for each expert would round its {fc2.scales.dtype.name} scales", node)
    factors = [float(f) for f in np.asarray(table.numpy())]
    bias = None if fc2.bias is None else scaled(fc2.bias, factors)
    return fc1, QuantizedProjection(fc2.codes, scaled(fc2.scales, factors), fc2.zero_points, bias, fc2.shape)


def _stack(weights: Sequence[Weight], biases: Sequence[View | None], what: str, node: ir.Node) -> QuantizedProjection:
    packed = [weight for weight in weights if isinstance(weight, Packed)]
    if len(packed) != len(weights):
        raise Declined(f"{what} is float in some experts and quantized in others", node)
    first = packed[0]
    n, k = first.sizes
    for expert, weight in enumerate(packed):
        if (weight.sizes, weight.bits, weight.block) != ((n, k), first.bits, first.block):
            raise Declined(f"{what} of expert {expert} is quantized otherwise than that of expert 0", node)
    if k % first.block:
        raise Declined(
            f"K = {k} of {what} is not divisible by the block size {first.block}, as QMoE needs",
            node,
            remedy=OTHER_BLOCK_SIZE,
        )
    require_alike([w.scales for w in packed], f"scales of {what}", node)
    has_zeros = require_alike([w.zero_points for w in packed], f"zero points of {what}", node)
    has_bias = require_alike(biases, f"bias of {what}", node)
    codes = stacked([w.codes for w in packed])
    return QuantizedProjection(
        codes.reshape((*codes.shape[:2], codes.shape[2] * codes.shape[3])),
        stacked([w.scales for w in packed]),
        stacked([w.zero_points for w in packed if w.zero_points is not None]) if has_zeros else None,
        stacked([bias for bias in biases if bias is not None]) if has_bias else None,
        QuantizedShape(n, k, first.bits, first.block, not has_zeros),
    )


def _in_turn(gate: QuantizedProjection, up: QuantizedProjection) -> QuantizedProjection:
    zeros = None
    if gate.zero_points is not None and up.zero_points is not None:
        zeros = interleaved(gate.zero_points, up.zero_points)
    bias = None
    if gate.bias is not None or up.bias is not None:
        bias = interleaved(gate.bias or _zeros(gate), up.bias or _zeros(up))
    return QuantizedProjection(
        interleaved(gate.codes, up.codes),
        interleaved(gate.scales, up.scales),
        zeros,
        bias,
        replace(gate.shape, n=2 * gate.shape.n),
    )


def _zeros(projection: QuantizedProjection) -> View:
    array = np.zeros(projection.scales.shape[:2], projection.scales.dtype.numpy())
    return View.whole(ir.tensor(array, name="zeros"), "zeros")


def require_kernel(
    run: Run,
    form: ExpertForm,
    routing: Routing,
    dtype: ir.DataType,
    projections: tuple[QuantizedProjection, QuantizedProjection],
    node: ir.Node,
) -> KernelChoice:
    """Returns what runs it; declines where the target has no exact QMoE of this form."""
    target = run.target
    if routing.weights is None:
        choices = exact_kernels(target, form, dtype)
    else:
        kernels = target.runs(QMOE.name, form, dtype.name, weighted=True)
        choices = kernels if isinstance(kernels, str) else [KernelChoice(kernel, weighted=True) for kernel in kernels]
    if isinstance(choices, str):
        raise no_kernel(QMOE.name, target, choices, node)
    shapes = [p.shape for p in projections]
    reasons = [refusal(own.kernel, shapes, RAW) for own in choices]
    choice = next((own for own, reason in zip(choices, reasons, strict=True) if reason is None), None)
    if choice is None:
        raise no_kernel(QMOE.name, target, reasons[0] or "", node)
    return choice
