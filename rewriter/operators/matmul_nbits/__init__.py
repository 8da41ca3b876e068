"""com.microsoft::MatMulNBits: slots, attributes, and one [N, K] weight as B, scales and zero points."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from rewriter.graph.contents import integer
from rewriter.operators.layout import blocks
from rewriter.operators.layout.stored import Cutlass, Layout, RowMajor
from rewriter.operators.operator import Operator
from rewriter.quantize.types import QuantizedShape

MATMUL_NBITS = Operator(
    name="MatMulNBits",
    inputs=("A", "B", "scales", "zero_points?", "g_idx?", "bias?"),
    attributes={
        "K": None,
        "N": None,
        "block_size": None,
        "bits": 4,
        "accuracy_level": 0,
        "weight_prepacked": None,
    },
    gained={"weight_prepacked": (1, 28)},
    quantized=True,
)
PARTS = (1, 2, 3)
"""Slots of B, scales and zero points."""
BIAS = 5
"""Slot of what is added."""


def _refuse(shape: QuantizedShape) -> str | None:
    return blocks.refuse(shape, MATMUL_NBITS.name)


def _refuse_prepacked(shape: QuantizedShape) -> str | None:
    return _refuse(shape) or blocks.refuse_partial(shape, "a prepacked MatMulNBits")


_NAMES = ("B", "scales", "zero_points")
RAW = Layout("raw", "matmul_nbits", RowMajor(), _refuse, blocks.per_block, blocks.blobs, _NAMES)
"""Padded as ONNX Runtime's own quantizers do it: codes past K are 0, zero points past the last block 2^(bits-1).

(For 2 bits and K not a multiple of 4 the runtime leaves stale codes past K, which no kernel reads; here they are 0.)
"""
LAYOUTS = (
    RAW,
    Layout("cutlass-sm80", "matmul_nbits", Cutlass(80), _refuse_prepacked, blocks.per_block, blocks.blobs, _NAMES),
    Layout("cutlass-sm90", "matmul_nbits", Cutlass(90), _refuse_prepacked, blocks.per_block, blocks.blobs, _NAMES),
)
"""Layouts of a weight; ``weight_prepacked`` is the index."""


@dataclass(frozen=True)
class Attributes:
    """What a MatMulNBits node says of its weight.

    Attributes:
        n: output features; 0 where the node does not say.
        k: input features; 0 where the node does not say.
        bits: width of a code.
        block: input features per scale; 0 where the node does not say.
        prepacked: the attribute ``weight_prepacked``.
        accuracy_level: the attribute.
    """

    n: int
    k: int
    bits: int
    block: int
    prepacked: int
    accuracy_level: int

    @property
    def layout(self) -> Layout | None:
        """The layout of B; None for a ``weight_prepacked`` that is none."""
        return LAYOUTS[self.prepacked] if 0 <= self.prepacked < len(LAYOUTS) else None


def attributes_of(node: ir.Node) -> Attributes:
    """Reads a MatMulNBits node; absent attributes have the schema's defaults."""
    return Attributes(
        n=integer(node, "N", 0),
        k=integer(node, "K", 0),
        bits=integer(node, "bits", 4),
        block=integer(node, "block_size", 0),
        prepacked=integer(node, "weight_prepacked", 0),
        accuracy_level=integer(node, "accuracy_level", 0),
    )
