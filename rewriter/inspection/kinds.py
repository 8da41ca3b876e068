"""How a stored tensor takes part in a weight: as a float matrix, as codes and scales, or as a bias."""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir

from rewriter.graph.contents import Slot, integer
from rewriter.operators.form import SLOTS, quantized_of

Kind = Literal["float", "quantized", "bias"]

_BIASES = {"MoE": SLOTS["MoE"]["bias"], "QMoE": SLOTS["QMoE"]["bias"], "MatMulNBits": (5,)}
"""Operator -> inputs that it adds."""


def quantization(slot: Slot) -> tuple[int, str, bool]:
    """Returns bits and operator of the quantized weight that a tensor belongs to, and whether it holds the codes."""
    if isinstance(slot.owner, ir.Node):
        return 0, "", False
    for use in slot.owner.uses():
        node, idx = use.node, use.idx
        match node.op_type:
            case "MatMulNBits" if 1 <= idx <= 3:
                return integer(node, "bits", 4), node.op_type, idx == 1
            case "GatherBlockQuantized" if idx in (0, 2, 3):
                return integer(node, "bits", 4), node.op_type, idx == 0
            case "DequantizeLinear" if slot.tensor.dtype.is_floating_point() == (idx == 1):
                codes = node.inputs[0]
                width = codes.dtype.bitwidth if codes is not None and codes.dtype is not None else 8
                return width, node.op_type, idx == 0
            case "QMoE":
                slots = SLOTS["QMoE"]
                for position, bits in enumerate(quantized_of(node).bits):
                    if idx in (slots["weight"][position], slots["scales"][position], slots["zero_points"][position]):
                        return bits, node.op_type, idx == slots["weight"][position]
    return 0, "", False


def is_bias(slot: Slot) -> bool:
    """Whether a tensor is what an operator adds to its product."""
    uses = slot.owner.uses() if isinstance(slot.owner, ir.Value) else ()
    return any(use.idx in _BIASES.get(use.node.op_type, ()) for use in uses)
