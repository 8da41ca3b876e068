"""Tells whether a stored tensor is a float matrix, codes or scales of a quantized one, or a bias."""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir

from rewriter.graph.contents import Slot
from rewriter.operators import gather_block_quantized, matmul_nbits
from rewriter.operators.form import OPERATORS as EXPERTS
from rewriter.operators.gather_block_quantized import GATHER_BLOCK_QUANTIZED
from rewriter.operators.matmul_nbits import MATMUL_NBITS
from rewriter.operators.qmoe import QMOE, quantized_of

Kind = Literal["float", "quantized", "bias"]

_BIASES = {operator.name: tuple(slots.bias for slots in operator.projections) for operator in EXPERTS}
_BIASES[MATMUL_NBITS.name] = (matmul_nbits.BIAS,)
"""Operator -> inputs that it adds."""


def quantization(slot: Slot) -> tuple[int, str, bool]:
    """Returns bits and operator of the quantized weight that a tensor belongs to, and whether it holds the codes."""
    if isinstance(slot.owner, ir.Node):
        return 0, "", False
    for use in slot.owner.uses():
        node, idx = use.node, use.idx
        match node.op_type:
            case MATMUL_NBITS.name if idx in matmul_nbits.PARTS:
                return matmul_nbits.attributes_of(node).bits, node.op_type, idx == matmul_nbits.PARTS[0]
            case GATHER_BLOCK_QUANTIZED.name if idx != gather_block_quantized.INDICES:
                return gather_block_quantized.attributes_of(node).bits, node.op_type, idx == gather_block_quantized.DATA
            case "DequantizeLinear" if slot.tensor.dtype.is_floating_point() == (idx == 1):
                codes = node.inputs[0]
                width = codes.dtype.bitwidth if codes is not None and codes.dtype is not None else 8
                return width, node.op_type, idx == 0
            case QMOE.name:
                for slots, bits in zip(QMOE.projections, quantized_of(node).bits, strict=True):
                    if idx in slots.stacks and idx != slots.bias:
                        return bits, node.op_type, idx == slots.weight
    return 0, "", False


def is_bias(slot: Slot) -> bool:
    """Whether a tensor is what an operator adds to its product."""
    uses = slot.owner.uses() if isinstance(slot.owner, ir.Value) else ()
    return any(use.idx in _BIASES.get(use.node.op_type, ()) for use in uses)
