"""Reference com.microsoft::QMoE for integer quantization."""

from __future__ import annotations

from typing import Any

from onnx.reference.op_run import OpRun

from rewriter.errors import QuantizationError
from rewriter.operators.layout.stored import Layout, Refusal
from rewriter.operators.moe.reference import shared_form
from rewriter.operators.operator import DOMAIN
from rewriter.operators.qmoe import LAYOUT_KEY, QMOE, QUANT_TYPES, RAW, ROUTER_WEIGHTS, layout_named
from rewriter.operators.qmoe import weights_prepacked as weights_prepacked_of
from rewriter.operators.reference.common import (
    Array,
    Float32,
    as_float32,
    malformed,
    reshaped,
    slots,
    unsupported,
)
from rewriter.operators.reference.experts import Linear, feed_forward, flatten_tokens, mix, route
from rewriter.quantize.formats import FORMATS, INT, FormatName
from rewriter.quantize.types import QuantizedShape

OPERATOR = QMOE.name


class QMoE(OpRun):
    """A mixture of experts with integer weights, dequantized and computed in float32, returned in x's dtype.

    The layout of the weights is what the node's metadata says (``rewriter.layout``); without it, what
    ``weights_prepacked`` says, where absent or -1 is raw, as the CPU provider reads it. ``accuracy_level`` is how
    inexact a kernel may be; the reference is exact at every level.

    Source: the operator's schema; checked against ONNX Runtime's CPU kernel where that has one.
    """

    op_domain = DOMAIN

    def _run(
        self,
        *inputs: Array | None,
        expert_weight_bits: int = 4,
        fc1_expert_weight_bits: int | None = None,
        fc2_expert_weight_bits: int | None = None,
        fc3_expert_weight_bits: int | None = None,
        block_size: int = 0,
        quant_type: str = "int",
        weights_prepacked: int = -1,
        accuracy_level: int = 0,
        **attributes: Any,
    ) -> tuple[Array]:
        """Runs the operator on its 21 slots; see the schema.

        Raises:
            TargetError: a combination that ONNX Runtime does not define, or another quant_type.
            ModelError: shapes that do not belong together, or an unknown attribute.
        """
        known = next((name for name, text in QUANT_TYPES.items() if text == quant_type), None)
        if known is None:
            raise unsupported(OPERATOR, f"quant_type '{quant_type}'")
        own_format = FORMATS[known]
        slot = slots(OPERATOR, inputs, required=(0, 1, 2, 3, 5, 6), total=len(QMOE.inputs))
        taken = [own.global_scale for own in QMOE.projections] if own_format.global_scale else []
        if any(slot[extra] is not None for extra in range(ROUTER_WEIGHTS + 1, len(slot)) if extra not in taken):
            raise unsupported(OPERATOR, "activation scales, or global scales of integers")
        form = shared_form(OPERATOR, attributes)
        x, logits, mixing = slot[0], slot[1], slot[ROUTER_WEIGHTS]
        experts, wide, hidden = slot[2].shape[0], slot[3].shape[1], x.shape[-1]
        inter = wide // form.fused
        bits = [
            expert_weight_bits if own is None else own
            for own in (fc1_expert_weight_bits, fc2_expert_weight_bits, fc3_expert_weight_bits)
        ]
        layout = self._layout(weights_prepacked, known)

        def linear(index: int, n: int, k: int) -> Linear:
            own = QMOE.projections[index]
            last = own.global_scale if own_format.global_scale else own.zero_points
            arrays = tuple(None if at is None else slot[at] for at in (own.weight, own.scales, own.bias, last))
            block = max(block_size, 0) if own_format.block is None else own_format.block
            symmetric = own_format.global_scale or arrays[3] is None
            return _linear(
                own.name, arrays, experts, layout, QuantizedShape(n, k, bits[index], block, symmetric, known)
            )

        fc1 = linear(0, form.fused * inter, hidden)
        fc2 = linear(1, hidden, inter)
        fc3 = None if slot[QMOE.projections[2].weight] is None else linear(2, inter, hidden)
        expert = feed_forward(OPERATOR, form, fc1, fc2, fc3)
        tokens = as_float32(flatten_tokens(OPERATOR, x, "input", hidden))
        probs = as_float32(flatten_tokens(OPERATOR, logits, "router_probs", experts))
        if mixing is not None:
            mixing = as_float32(flatten_tokens(OPERATOR, mixing, "router_weights", experts))
        selected, weights = route(OPERATOR, form, probs, mixing)
        return (mix(tokens, selected, weights, expert).reshape(x.shape).astype(x.dtype),)

    def _layout(self, prepacked: int, own: FormatName) -> Layout:
        stamps = {prop.key: prop.value for prop in self.onnx_node.metadata_props}
        if LAYOUT_KEY not in stamps:
            if prepacked == 1 or own != INT.name:
                raise unsupported(
                    OPERATOR,
                    f"weights_prepacked={prepacked} of {own} unless the node's metadata {LAYOUT_KEY} says which layout",
                )
            return RAW
        try:
            layout = layout_named(stamps[LAYOUT_KEY])
        except QuantizationError as error:
            raise malformed(OPERATOR, str(error)) from error
        if prepacked == 1 - weights_prepacked_of(layout, own):
            raise malformed(OPERATOR, f"weights_prepacked={prepacked} contradicts {layout.name} weights")
        return layout


def _linear(name: str, arrays: tuple[Array | None, ...], experts: int, layout: Layout, shape: QuantizedShape) -> Linear:
    """Returns one projection; an expert is dequantized when a token comes to it.

    Args:
        name: fc1, fc2 or fc3, for errors.
        arrays: codes, scales, bias and zero points, or the global scale.
        experts: E.
        layout: of the codes.
        shape: of one expert's weight.
    """
    codes, scales, bias, last = arrays
    stored = layout.of(shape)
    if isinstance(stored, Refusal):
        raise malformed(OPERATOR, f"{name}: {stored.reason}")
    if codes is None or scales is None:
        raise malformed(OPERATOR, f"{name} has no codes or no scales")
    if codes.shape != (experts, *stored.codes):
        expected = [experts, *stored.codes]
        raise malformed(OPERATOR, f"{name} codes have shape {list(codes.shape)}; expected {expected}")
    stacks = [codes, reshaped(OPERATOR, f"{name}_scales", scales, (experts, *stored.scales))]
    if last is not None and stored.zero_points is not None:
        stacks.append(reshaped(OPERATOR, f"{name}_zero_points", last, (experts, *stored.zero_points)))
    elif FORMATS[shape.format].global_scale:
        if last is None:
            raise malformed(OPERATOR, f"{name} has no global scale, which {shape.format} needs")
        stacks.append(reshaped(OPERATOR, f"{name}_global_scale", last, (experts,)))
    offsets = None if bias is None else reshaped(OPERATOR, f"{name}_bias", bias, (experts, shape.n))

    def run(expert: int, x: Float32) -> Float32:
        y = x @ stored.unpack([stack[expert] for stack in stacks]).dequantize().T
        return y if offsets is None else y + as_float32(offsets[expert])

    return run
