"""Reference com.microsoft::QMoE for integer quantization."""

from __future__ import annotations

from typing import Any

from onnx.reference.op_run import OpRun

from rewriter.errors import QuantizationError
from rewriter.operators.layout import qmoe as layout
from rewriter.operators.reference._common import (
    DOMAIN,
    Array,
    Float32,
    as_float32,
    malformed,
    reshaped,
    slots,
    unsupported,
)
from rewriter.operators.reference._experts import Linear, feed_forward, flatten_tokens, mix, route
from rewriter.operators.reference.moe import shared_attributes

OPERATOR = "QMoE"


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
        if quant_type != "int":
            raise unsupported(OPERATOR, f"quant_type '{quant_type}'")
        slot = slots(OPERATOR, inputs, required=(0, 1, 2, 3, 5, 6), total=21)
        if any(extra is not None for extra in slot[15:]):
            raise unsupported(OPERATOR, "global or activation scales")
        shared = shared_attributes(OPERATOR, attributes)
        x, logits, mixing = slot[0], slot[1], slot[14]
        experts, wide, hidden = slot[2].shape[0], slot[3].shape[1], x.shape[-1]
        inter = wide // shared.fused
        bits = [
            expert_weight_bits if own is None else own
            for own in (fc1_expert_weight_bits, fc2_expert_weight_bits, fc3_expert_weight_bits)
        ]
        prepacked = self._prepacked(weights_prepacked)

        def linear(index: int, first: int, n: int, k: int) -> Linear:
            own = (*slot[first : first + 3], slot[10 + index])
            name = f"fc{index}"
            return _linear(name, own, (experts, n, k), bits[index - 1], block=max(block_size, 0), prepacked=prepacked)

        fc1 = linear(1, 2, shared.fused * inter, hidden)
        fc2 = linear(2, 5, hidden, inter)
        fc3 = None if slot[8] is None else linear(3, 8, inter, hidden)
        expert = feed_forward(OPERATOR, shared, fc1, fc2, fc3)
        tokens = as_float32(flatten_tokens(OPERATOR, x, "input", hidden))
        probs = as_float32(flatten_tokens(OPERATOR, logits, "router_probs", experts))
        if mixing is not None:
            mixing = as_float32(flatten_tokens(OPERATOR, mixing, "router_weights", experts))
        selected, weights = route(OPERATOR, shared, probs, mixing)
        return (mix(tokens, selected, weights, expert).reshape(x.shape).astype(x.dtype),)

    def _prepacked(self, weights_prepacked: int) -> int | None:
        """Returns None for raw weights, else the architecture of their CUTLASS layout."""
        stamps = {prop.key: prop.value for prop in self.onnx_node.metadata_props}
        if layout.LAYOUT_KEY not in stamps:
            if weights_prepacked == 1:
                raise unsupported(
                    OPERATOR, f"weights_prepacked=1 unless the node's metadata {layout.LAYOUT_KEY} says which layout"
                )
            return None
        try:
            prepacked = layout.layout_of(stamps[layout.LAYOUT_KEY])
        except QuantizationError as error:
            raise malformed(OPERATOR, str(error)) from error
        if (prepacked is None and weights_prepacked == 1) or (prepacked is not None and weights_prepacked == 0):
            raise malformed(
                OPERATOR, f"weights_prepacked={weights_prepacked} contradicts {stamps[layout.LAYOUT_KEY]} weights"
            )
        return prepacked


def _linear(
    name: str,
    arrays: tuple[Array | None, ...],
    shape: tuple[int, int, int],
    bits: int,
    *,
    block: int,
    prepacked: int | None,
) -> Linear:
    """Returns one projection; an expert is dequantized when a token comes to it.

    Args:
        name: fc1, fc2 or fc3, for errors.
        arrays: codes, scales, bias and zero points.
        shape: E, N, K.
        bits: width of a code.
        block: input features per scale; 0 is the whole row.
        prepacked: None for raw codes, else the architecture of their CUTLASS layout.
    """
    codes, scales, bias, zeros = arrays
    experts, n, k = shape
    if reason := layout.illegal(n, k, bits, block, prepacked=prepacked):
        raise malformed(OPERATOR, f"{name}: {reason}")
    codes_shape, scales_shape, zeros_shape = layout.shapes(
        experts, n, k, bits, block, symmetric=zeros is None, prepacked=prepacked
    )
    if codes is None or scales is None:
        raise malformed(OPERATOR, f"{name} has no codes or no scales")
    if codes.shape != codes_shape:
        raise malformed(OPERATOR, f"{name} codes have shape {list(codes.shape)}; expected {list(codes_shape)}")
    scales = reshaped(OPERATOR, f"{name}_scales", scales, scales_shape)
    if zeros is not None and zeros_shape is not None:
        zeros = reshaped(OPERATOR, f"{name}_zero_points", zeros, zeros_shape)
    offsets = None if bias is None else reshaped(OPERATOR, f"{name}_bias", bias, (experts, n))

    def run(expert: int, x: Float32) -> Float32:
        own = layout.QMoEArrays(codes[expert], scales[expert], None if zeros is None else zeros[expert])
        y = x @ layout.unpack(own, n, k, bits, block, prepacked=prepacked).dequantize().T
        return y if offsets is None else y + as_float32(offsets[expert])

    return run
