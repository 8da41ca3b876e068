"""What became of a weight, in a few numbers that outlive it: in a report, in a journal, on another machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rewriter.quantize import error
from rewriter.quantize.types import FloatArray, QuantizedWeight


@dataclass(frozen=True)
class Measured:
    """How far a quantized weight is from the float one.

    Attributes:
        nbytes: of its codes, scales and zero points as they are stored.
        relative_rms: relative RMS error of the weight.
        output_rms: that of its output; None where nothing is known of its inputs.
        algorithm: that quantized it, where it is not the one that was asked for; else empty.
    """

    nbytes: int
    relative_rms: float
    output_rms: float | None = None
    algorithm: str = ""


def same(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    """Whether two quantized weights are made of the same bits."""

    def kind(weight: QuantizedWeight) -> tuple[object, ...]:
        return weight.bits, weight.block_size, weight.format, weight.global_scale, weight.zero_points is None

    return (
        kind(one) == kind(other)
        and error.equal(one.codes, other.codes)
        and error.equal(one.scales, other.scales)
        and (one.zero_points is None or other.zero_points is None or error.equal(one.zero_points, other.zero_points))
    )


def measure(
    weight: FloatArray, quantized: QuantizedWeight, nbytes: int, inputs: Callable[[], FloatArray] | None
) -> Measured:
    """Compares a quantized weight [N, K] with the float one, and their outputs on inputs [T, K] where there are any."""
    output = None if inputs is None else error.relative_output_rms(weight, quantized, inputs())
    return Measured(nbytes, error.relative_rms(weight, quantized), output, quantized.algorithm)
