"""What became of a weight, in a few numbers that outlive it: in a report, in a journal, on another machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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


def measure(
    weight: FloatArray, quantized: QuantizedWeight, nbytes: int, inputs: Callable[[], FloatArray] | None
) -> Measured:
    """Compares a quantized weight [N, K] with the float one, and their outputs on inputs [T, K] where there are any."""
    from rewriter.quantize import error  # noqa: PLC0415 -- compiled loops, which planning needs none of

    output = None if inputs is None else error.relative_output_rms(weight, quantized, inputs())
    return Measured(nbytes, error.relative_rms(weight, quantized), output, quantized.algorithm)
