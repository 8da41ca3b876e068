"""What goes into a quantizer and what comes out: codes, scales and zero points that know no layout."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from rewriter.errors import QuantizationError
from rewriter.quantize.formats import FORMATS, INT, FormatName
from rewriter.tensors import View

FloatArray = npt.NDArray[np.floating]
CodeArray = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class WeightSpec:
    """How one weight is to be quantized: the plan's answer for it.

    Attributes:
        algorithm: name of a built-in algorithm, or ``custom`` for a user's function.
        bits: 2, 3, 4 or 8.
        block_size: input features that share one scale; 0 is one scale per output channel.
        symmetric: True for no zero points (the zero point is then 2^(bits-1)).
        format: what codes and scales are, of ``formats.FORMATS``; mxfp4 and nvfp4 have 4 bits, blocks of 32 and 16 and
            no zero points.
        lossless: whether a weight that lies on a grid, as one that was trained in few bits does, keeps it, whatever
            bits, blocks and format are asked for.
    """

    algorithm: str = "rtn"
    bits: int = 4
    block_size: int = 32
    symmetric: bool = True
    format: FormatName = "int"
    lossless: bool = False

    @property
    def form(self) -> str:
        """Width, blocks and zero points, in words."""
        if self.format != INT.name:
            return self.format
        blocks = f"blocks of {self.block_size}" if self.block_size else "one block a row"
        return f"{self.bits} bits in {blocks}, {'symmetric' if self.symmetric else 'asymmetric'}"


@dataclass(frozen=True)
class WeightContext:
    """What a quantizer may know about the weight it is given.

    Attributes:
        spec: bits, block size, symmetry and algorithm that the plan asks for.
        scale_dtype: dtype in which the scales will be stored (float32, float16 or bfloat16).
        weight: its name: that of the model's constant, with the part of it that it is (``experts.weight__slice_3``), or
            of the constants that are one weight here (``{gate,up}.weight``). No other weight of the model has it.
        sources: names of those constants, as the model has them.
        node: name of the node that reads it.
        rule: the rule that replaces it.
        role: ``expert.down``, ``lm_head``, ``attention.q`` ...; empty where the structure does not tell.
        expert: expert index, or None.
        layer: layer index, or None.
        importance: [K] non-negative weights of the squared error per input feature, or None.
        activations: reads what this very weight saw when the model was calibrated, [tokens, K] float32, its features in
            the order of the weight's columns and of no rows where no token came by; None where that is not known.
        uncalibrated: why what it saw is not known; empty where it is.
        planned: what the plan asked for, where ``spec`` is another form; else None.
        because: why the form is another than the planned one.
        off_grid: which block keeps it off the grid on which nearly all of it lies; else empty.
    """

    spec: WeightSpec
    scale_dtype: np.dtype[np.generic]
    weight: str = ""
    sources: tuple[str, ...] = ()
    node: str = ""
    rule: str = ""
    role: str = ""
    expert: int | None = None
    layer: int | None = None
    importance: FloatArray | None = None
    activations: Callable[[], npt.NDArray[np.float32]] | None = None
    uncalibrated: str = ""
    planned: WeightSpec | None = None
    off_grid: str = ""
    because: str = ""


@dataclass(frozen=True)
class QuantizedShape:
    """What a stored layout must know of a quantized weight.

    Attributes:
        n: output features.
        k: input features.
        bits: 2, 3, 4 or 8.
        block: input features per scale; 0 is the whole row.
        symmetric: True for no zero points.
        format: what codes and scales are.
    """

    n: int
    k: int
    bits: int
    block: int
    symmetric: bool = True
    format: FormatName = "int"

    @property
    def blocks(self) -> int:
        """Scales of a row."""
        return -(-self.k // self.block) if self.block else 1


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized [N, K] weight; ``dequantized = (code - zero_point) * scale``.

    In mxfp4 and nvfp4, ``dequantized = value of the code * scale * global scale``.

    Attributes:
        codes: [N, K] uint8, each below 2^bits.
        scales: [N, ceil(K / block)] in the dtype in which they will be stored; may be negative.
        zero_points: [N, ceil(K / block)] uint8, or None for 2^(bits-1) everywhere.
        bits: 2, 3, 4 or 8.
        block_size: input features per scale; 0 is the whole row.
        algorithm: id of the algorithm that made it, where that is not the one that was asked for.
        format: what codes and scales are.
        global_scale: multiplies all scales; 1 for integers.
    """

    codes: CodeArray
    scales: FloatArray
    zero_points: CodeArray | None
    bits: int
    block_size: int
    algorithm: str = ""
    format: FormatName = "int"
    global_scale: float = 1.0

    @property
    def shape(self) -> QuantizedShape:
        """What a layout must know of it."""
        n, k = self.codes.shape
        return QuantizedShape(n, k, self.bits, self.block_size, self.zero_points is None, self.format)

    def dequantize(self) -> npt.NDArray[np.float32]:
        """Returns the [N, K] float32 weight that a kernel computes with; in one buffer of its size."""
        k = self.codes.shape[1]
        block = self.block_size or k
        values = FORMATS[self.format].values
        if values is not None:
            scales = self.scales.astype(np.float32) * np.float32(self.global_scale)
            return np.take(np.array(values, np.float32), self.codes) * np.repeat(scales, block, axis=1)[:, :k]
        return dequantize(self.codes, self.scales, self.zero_points, self.bits, block)


def dequantize(
    codes: CodeArray, scales: FloatArray, zero_points: npt.NDArray[Any] | None, bits: int, block: int
) -> npt.NDArray[np.float32]:
    """Returns ``(code - zero_point) * scale``, [..., K].

    Args:
        codes: [..., K].
        scales: [..., ceil(K / block)], of any float dtype.
        zero_points: [..., ceil(K / block)] uint8 or float, or None for 2^(bits-1).
        bits: width of a code.
        block: input features per scale.
    """
    floats = codes.astype(np.float32)
    *outer, k = floats.shape
    whole = k // block
    parts = [(slice(whole), floats[..., : whole * block].reshape(*outer, whole, block))]
    if k % block:
        parts.append((slice(whole, None), floats[..., None, whole * block :]))
    for own, part in parts:
        middle = None if zero_points is None else zero_points[..., own, None].astype(np.float32)
        np.subtract(part, np.float32(1 << (bits - 1)) if middle is None else middle, out=part)
        np.multiply(part, scales[..., own, None].astype(np.float32), out=part)
    return floats


def largest(scales: FloatArray) -> float:
    """Returns the largest magnitude; NaN where one is, and 0 of none."""
    if not scales.size:
        return 0.0
    if scales.dtype.itemsize == 1:
        return float(np.abs(scales.astype(np.float32)).max())
    # But for the sign, bits of floats are in the order of their magnitudes, NaN last; NumPy has no loops for halves.
    bits = scales.view(f"u{scales.dtype.itemsize}")
    return float((bits & ((1 << (8 * bits.itemsize - 1)) - 1)).max().view(scales.dtype))


class Calibration(Protocol):
    """What the weights of one model saw when it was run on a user's inputs."""

    def of(self, weight: View, expert: int | None = None) -> Callable[[], npt.NDArray[np.float32]] | None:
        """Returns what reads the inputs of a weight [N, K], as ``WeightContext.activations`` has it.

        Args:
            weight: of the model that was calibrated, however its stored tensors are cut, turned and joined.
            expert: which expert it is, where the axes of what is stored do not tell.
        """


Quantizer = Callable[[FloatArray, WeightContext], QuantizedWeight]
"""``(weight [N, K] in its stored dtype, read-only; context) -> QuantizedWeight``."""


def check_promise(result: QuantizedWeight, shape: tuple[int, int], context: WeightContext, quantizer: str = "") -> None:
    """Holds a quantizer to what it promised: shapes, dtypes, ranges, finite scales.

    Args:
        result: what it returned.
        shape: (N, K) of the weight.
        context: what it was told.
        quantizer: how messages name it; by default as the plan does.

    Raises:
        QuantizationError: names the weight and what is wrong.
    """
    n, k = shape
    spec = context.spec
    blocks = -(-k // (spec.block_size or k))

    def broken(what: str) -> QuantizationError:
        return QuantizationError(
            f"the quantizer '{quantizer or spec.algorithm}' broke its promise for weight '{context.weight}': {what}"
        )

    if not isinstance(result, QuantizedWeight):
        raise broken(f"it returned a {type(result).__name__}, not a QuantizedWeight")
    for name in ("codes", "scales", *(["zero_points"] if result.zero_points is not None else [])):
        if not isinstance(getattr(result, name), np.ndarray):
            raise broken(f"{name} are a {type(getattr(result, name)).__name__}, not an array")
    if (result.bits, result.block_size) != (spec.bits, spec.block_size):
        raise broken(
            f"bits and block size are {result.bits}, {result.block_size}; asked {spec.bits}, {spec.block_size}"
        )
    if result.format != spec.format:
        raise broken(f"its codes are {result.format}; asked {spec.format}")
    if not np.isfinite(result.global_scale) or (result.global_scale != 1 and not FORMATS[spec.format].global_scale):
        raise broken(f"its global scale is {result.global_scale:g}, which {spec.format} has not")
    if result.codes.shape != (n, k) or result.codes.dtype != np.uint8:
        raise broken(f"codes are {result.codes.dtype}{list(result.codes.shape)}; expected uint8[{n}, {k}]")
    if result.scales.shape != (n, blocks) or result.scales.dtype != context.scale_dtype:
        raise broken(
            f"scales are {result.scales.dtype}{list(result.scales.shape)};"
            f" expected {context.scale_dtype}[{n}, {blocks}]"
        )
    if (result.zero_points is None) != spec.symmetric:
        raise broken("zero points must be given if and only if the weight is asymmetric")
    if not math.isfinite(largest(result.scales)):
        raise broken("a scale is not finite")
    top = (1 << spec.bits) - 1
    if spec.bits < 8 and result.codes.size and int(result.codes.max()) > top:
        raise broken(f"a code exceeds {top}")
    if result.zero_points is not None:
        zeros = result.zero_points
        if zeros.shape != (n, blocks) or zeros.dtype != np.uint8:
            raise broken(f"zero points are {zeros.dtype}{list(zeros.shape)}; expected uint8[{n}, {blocks}]")
        if zeros.size and int(zeros.max()) > top:
            raise broken(f"a zero point exceeds {top}")
