"""com.microsoft::GatherBlockQuantized over uint8 data (gather_axis 0, quantize_axis last): slots, attributes, layouts.

Two layouts. The *table*: rows packed whole, [V, K * bits / 8]; a stack of experts [E, N, K * bits / 8] is the same
thing stacked along a new first axis. And the *tied* one, whose data is MatMulNBits' own B [V, kb, blob], so that an
embedding and an output projection hold one tensor: there every block is a row of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from rewriter.errors import QuantizationError
from rewriter.graph.contents import integer
from rewriter.operators.layout import blocks
from rewriter.operators.layout.packing import codes_per_byte
from rewriter.operators.layout.stored import Layout, RowMajor, Stored
from rewriter.operators.operator import Operator
from rewriter.quantize.job import Arrays, Part
from rewriter.quantize.types import QuantizedShape, QuantizedWeight

GATHER_BLOCK_QUANTIZED = Operator(
    name="GatherBlockQuantized",
    inputs=("data", "indices", "scales", "zero_points?"),
    attributes={"bits": 4, "block_size": 128, "gather_axis": 0, "quantize_axis": 1},
    quantized=True,
)
DATA, INDICES, SCALES, ZERO_POINTS = range(4)
"""Slots."""


def _refuse(shape: QuantizedShape) -> str | None:
    reason = blocks.refuse(shape, GATHER_BLOCK_QUANTIZED.name)
    if reason is None and shape.k % codes_per_byte(shape.bits):
        row = f"a row of K = {shape.k} codes of {shape.bits} bits"
        return f"{row} does not end on a byte, as GatherBlockQuantized needs"
    return reason


def _refuse_tied(shape: QuantizedShape) -> str | None:
    return _refuse(shape) or blocks.refuse_partial(shape, "a table tied with MatMulNBits")


def _one_block_a_row(shape: QuantizedShape) -> tuple[int, ...]:
    """[V, kb, 1]: a zero point has a byte of its own."""
    return shape.n, shape.blocks, 1


_NAMES = ("data", "scales", "zero_points")
TABLE = Layout("table", "gather_block_quantized", RowMajor(), _refuse, blocks.per_block, arrays=_NAMES)
TIED = Layout("tied", "gather_block_quantized", RowMajor(), _refuse_tied, _one_block_a_row, blocks.blobs, _NAMES)
LAYOUTS = (TABLE, TIED)


@dataclass(frozen=True)
class Attributes:
    """What a GatherBlockQuantized node says of its table.

    Attributes:
        bits: width of a code.
        block: features per scale.
    """

    bits: int
    block: int


def attributes_of(node: ir.Node) -> Attributes:
    """Reads a GatherBlockQuantized node; absent attributes have the schema's defaults."""
    return Attributes(bits=integer(node, "bits", 4), block=integer(node, "block_size", 128))


@dataclass(frozen=True)
class LinearAndTied:
    """A weight as MatMulNBits stores it, and its zero points once more, one to a byte, for a tied table.

    Attributes:
        linear: the weight as MatMulNBits stores it; it has zero points.
        rows: the weight as a tied table.
    """

    linear: Stored
    rows: Stored

    @property
    def name(self) -> str:
        """Equal for weights whose arrays mean the same."""
        return f"{self.linear.name}-{self.rows.layout.name}"

    def parts(self, scale_dtype: ir.DataType) -> tuple[Part, ...]:
        """Returns the arrays of MatMulNBits and, the last, the table's zero points."""
        codes, scales, zeros = self.linear.parts(scale_dtype)
        _, _, by_byte = self.rows.parts(scale_dtype)
        return codes, scales, zeros, by_byte._replace(name=f"{codes.name}_by_byte")

    def pack(self, weight: QuantizedWeight) -> Arrays:
        return [*self.linear.pack(weight), self.rows.pack(weight)[2]]

    def unpack(self, arrays: Arrays) -> QuantizedWeight:
        """Exact inverse of ``pack``.

        Raises:
            QuantizationError: the two operators would not read the same weight.
        """
        codes, scales, zeros, by_byte = arrays
        linear = self.linear.unpack([codes, scales, zeros])
        rows = self.rows.unpack([codes, scales, by_byte])
        both = [(linear.codes, rows.codes), (linear.zero_points, rows.zero_points)]
        if not all(a is not None and b is not None and np.array_equal(a, b) for a, b in both):
            raise QuantizationError("its two readers would not read the same")
        return linear
