"""Stored layouts: the arrays that an operator reads in place of one quantized [N, K] weight, and back.

A layout is asked once whether it can hold a weight. It answers with a ``Stored``, which knows the shapes of its arrays,
packs and unpacks and cannot be illegal any more, or with a ``Refusal``, which says why not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import onnx_ir as ir

from rewriter.errors import QuantizationError
from rewriter.operators.layout import cutlass
from rewriter.operators.layout.packing import (
    as_shape,
    default_zero_point,
    pack_codes,
    packed_width,
    unpack_codes,
)
from rewriter.quantize.formats import FORMATS, INT, Format
from rewriter.quantize.job import Arrays, Part
from rewriter.quantize.types import CodeArray, QuantizedShape, QuantizedWeight

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Refusal:
    """Why a layout cannot hold a weight.

    Attributes:
        reason: one line.
    """

    reason: str


class CodeOrder(Protocol):
    """How the codes of a weight follow one another in its bytes."""

    def refusal(self, shape: QuantizedShape) -> str | None:
        """Returns why the codes of a weight cannot be ordered so, or None."""

    def shape(self, shape: QuantizedShape) -> Shape:
        """Returns the shape of the bytes of a weight."""

    def pack(self, codes: CodeArray, bits: int) -> CodeArray:
        """Returns the bytes of codes [N, K]."""

    def unpack(self, packed: CodeArray, shape: QuantizedShape) -> CodeArray:
        """Inverse of ``pack``."""


class RowMajor:
    """Row after row, low bits first: [N, ceil(K * bits / 8)]."""

    def refusal(self, shape: QuantizedShape) -> str | None:
        """None: rows may be of any length; an operator that wants whole bytes says so itself."""

    def shape(self, shape: QuantizedShape) -> Shape:
        """Returns [N, ceil(K * bits / 8)]."""
        return shape.n, packed_width(shape.k, shape.bits)

    def pack(self, codes: CodeArray, bits: int) -> CodeArray:
        """Returns [N, ceil(K * bits / 8)]; codes of 8 bits are bytes as they are."""
        if bits == 8:
            return np.ascontiguousarray(codes)
        return pack_codes(codes, bits)

    def unpack(self, packed: CodeArray, shape: QuantizedShape) -> CodeArray:
        """Inverse of ``pack``; bytes past K are ignored."""
        if shape.bits == 8:
            return np.ascontiguousarray(packed[..., : shape.k])
        return unpack_codes(packed, shape.bits, shape.k)


class ColumnMajor:
    """Column after column, low bits first: [K, N * bits / 8], codes of neighbouring output features in one byte."""

    def refusal(self, shape: QuantizedShape) -> str | None:
        """Returns why a column would not end on a byte, or None."""
        if shape.n * shape.bits % 8:
            return f"a column of N = {shape.n} codes of {shape.bits} bits does not end on a byte"
        return None

    def shape(self, shape: QuantizedShape) -> Shape:
        """Returns [K, N * bits / 8]."""
        return shape.k, packed_width(shape.n, shape.bits)

    def pack(self, codes: CodeArray, bits: int) -> CodeArray:
        """Returns [K, N * bits / 8]."""
        return pack_codes(np.ascontiguousarray(codes.T), bits)

    def unpack(self, packed: CodeArray, shape: QuantizedShape) -> CodeArray:
        """Inverse of ``pack``."""
        return np.ascontiguousarray(unpack_codes(packed, shape.bits, shape.n).T)


@dataclass(frozen=True)
class Cutlass:
    """CUTLASS' mixed-GEMM order: see ``cutlass``.

    Attributes:
        sm: 80 or 90.
    """

    sm: int

    def refusal(self, shape: QuantizedShape) -> str | None:
        """Returns why the order does not exist for a weight, or None."""
        return cutlass.illegal(shape.n, shape.k, shape.bits, self.sm)

    def shape(self, shape: QuantizedShape) -> Shape:
        """Returns [K, N * bits / 8]."""
        return cutlass.shape(shape.n, shape.k, shape.bits)

    def pack(self, codes: CodeArray, bits: int) -> CodeArray:
        """Returns [K, N * bits / 8]."""
        return cutlass.pack(codes, bits, self.sm)

    def unpack(self, packed: CodeArray, shape: QuantizedShape) -> CodeArray:
        """Inverse of ``pack``."""
        return cutlass.unpack(packed, shape.bits, self.sm)


@dataclass(frozen=True)
class Layout:
    """One way in which an operator stores a weight.

    Attributes:
        name: of the layout, as a node's metadata and the options of rules have it.
        operator: the operator that reads it.
        order: how the codes follow one another.
        refuse: what the operator itself does not take; it returns the reason, or None.
        codes: shape of the codes' bytes, where it is not the order's.
        per_block: shape of what there is one of for each block: scales, and zero points before they share bytes.
        arrays: names of codes, scales and zero points, for messages.
    """

    name: str
    operator: str
    order: CodeOrder
    refuse: Callable[[QuantizedShape], str | None]
    per_block: Callable[[QuantizedShape], Shape]
    codes: Callable[[QuantizedShape], Shape] | None = None
    arrays: tuple[str, str, str] = ("codes", "scales", "zero_points")

    def of(self, shape: QuantizedShape) -> Stored | Refusal:
        """Returns how a weight of this shape is stored, or why it cannot be."""
        reason = self.refuse(shape) or self.order.refusal(shape)
        return Stored(self, shape) if reason is None else Refusal(reason)

    def require(self, shape: QuantizedShape) -> Stored:
        """Returns how a weight of this shape is stored.

        Raises:
            QuantizationError: it cannot be; says why.
        """
        stored = self.of(shape)
        if isinstance(stored, Refusal):
            raise QuantizationError(stored.reason)
        return stored


@dataclass(frozen=True)
class Stored:
    """One weight in a layout that can hold it; made by ``Layout.of``.

    Attributes:
        layout: the layout.
        shape: of the weight.
    """

    layout: Layout
    shape: QuantizedShape

    @property
    def name(self) -> str:
        """Equal for weights whose arrays mean the same."""
        return f"{self.layout.operator}-{self.layout.name}"

    @cached_property
    def codes(self) -> Shape:
        """Shape of the codes' bytes."""
        return (self.layout.codes or self.layout.order.shape)(self.shape)

    @cached_property
    def scales(self) -> Shape:
        """Shape of the scales."""
        return self.layout.per_block(self.shape)

    @cached_property
    def zero_points(self) -> Shape | None:
        """Shape of the zero points; None where there are none."""
        *lead, last = self.layout.per_block(self.shape)
        return None if self.shape.symmetric else (*lead, packed_width(last, self.shape.bits))

    def parts(self, scale_dtype: ir.DataType) -> tuple[Part, ...]:
        """Returns suffix of the name, element type and shape of each array, in the order in which ``pack`` has them.

        Args:
            scale_dtype: of the scales, where the format of the codes says none.
        """
        own = self._format
        if own.scale_dtype is not None:
            scale_dtype = ir.DataType.from_numpy(own.scale_dtype)
        found = [
            Part(f"q{self.shape.bits}" if own is INT else own.name, ir.DataType.UINT8, self.codes),
            Part("scales", scale_dtype, self.scales),
        ]
        if own.global_scale:
            found.append(Part("global_scale", ir.DataType.FLOAT, ()))
        if self.zero_points is not None:
            found.append(Part("zero_points", ir.DataType.UINT8, self.zero_points))
        return tuple(found)

    def pack(self, weight: QuantizedWeight) -> Arrays:
        """Returns codes, scales and, where there are any, the global scale or zero points, padded with 2^(bits-1).

        Raises:
            QuantizationError: it is another weight than this holds, or a code or zero point does not fit.
        """
        if weight.shape != self.shape:
            raise QuantizationError(f"the layout holds {self.shape}, not {weight.shape}")
        scales = as_shape(weight.scales, self.scales, self.layout.arrays[1])
        if self._format.global_scale:
            return [self.pack_codes(weight.codes), scales, np.array(weight.global_scale, np.float32)]
        if weight.zero_points is None:
            return [self.pack_codes(weight.codes), scales]
        rows = as_shape(weight.zero_points, self.scales, self.layout.arrays[2])
        zero_points = pack_codes(rows, self.shape.bits, pad=default_zero_point(self.shape.bits))
        return [self.pack_codes(weight.codes), scales, zero_points]

    def unpack(self, arrays: Arrays) -> QuantizedWeight:
        """Exact inverse of ``pack``; also of arrays whose axes an exporter flattened.

        Raises:
            QuantizationError: the arrays do not belong to such a weight.
        """
        shape = self.shape
        one_a_block = (shape.n, shape.blocks)
        codes, scales, *zeros = arrays
        zero_points, global_scale = None, 1.0
        if self._format.global_scale:
            global_scale = float(np.asarray(zeros[0]).reshape(()))
        if self.zero_points is not None:
            packed = as_shape(zeros[0], self.zero_points, self.layout.arrays[2])
            zero_points = unpack_codes(packed, shape.bits, self.scales[-1]).reshape(one_a_block)
        return QuantizedWeight(
            self.unpack_codes(codes),
            as_shape(as_shape(scales, self.scales, self.layout.arrays[1]), one_a_block, self.layout.arrays[1]),
            zero_points,
            shape.bits,
            shape.block,
            format=shape.format,
            global_scale=global_scale,
        )

    def pack_codes(self, codes: CodeArray) -> CodeArray:
        """Returns the bytes of the codes [N, K] alone; 0 past K."""
        packed = self.layout.order.pack(codes, self.shape.bits)
        padding = math.prod(self.codes) - packed.size
        if padding:
            packed = np.pad(packed, ((0, 0), (0, padding // self.shape.n)))
        return packed.reshape(self.codes)

    def unpack_codes(self, packed: CodeArray) -> CodeArray:
        """Inverse of ``pack_codes``: [N, K].

        Raises:
            QuantizationError: the bytes do not belong to such a weight.
        """
        packed = as_shape(packed, self.codes, self.layout.arrays[0])
        rows = (self.shape.n, -1) if math.prod(self.codes) != math.prod(self._ordered) else self._ordered
        return self.layout.order.unpack(packed.reshape(rows), self.shape)

    @property
    def _format(self) -> Format:
        return FORMATS[self.shape.format]

    @cached_property
    def _ordered(self) -> Shape:
        return self.layout.order.shape(self.shape)


def by_name(layouts: Sequence[Layout], name: str) -> Layout | None:
    """Returns the layout of a name, or None."""
    return next((layout for layout in layouts if layout.name == name), None)
