"""The codes of a quantized weight are the nearest to it, given its scales and zero points."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rewriter.quantize.formats import FORMATS
from rewriter.quantize.job import QuantizationJob
from rewriter.quantize.types import QuantizedWeight

_TIE = 0.51
"""Largest distance from the nearest level, in scales: half of one, and what rounding adds to that."""


def check_codes(job: QuantizationJob) -> None:
    """Holds codes, scales and zero points to the weight: every other check takes what they say for the weight itself.

    Raises:
        AssertionError: another code would come nearer.
    """
    quantized = job.quantize()
    block = quantized.block_size or job.shape[1]
    scale = np.repeat(quantized.scales.astype(np.float64), block, axis=1)[:, : job.shape[1]] * quantized.global_scale
    values = FORMATS[quantized.format].values
    if values is not None:
        _check_values(job, quantized, scale, np.array(values))
        return
    if quantized.zero_points is None:
        zero = np.full(scale.shape, 1 << (quantized.bits - 1), np.int64)
    else:
        zero = np.repeat(quantized.zero_points.astype(np.int64), block, axis=1)[:, : job.shape[1]]
    wanted = np.asarray(job.weight.numpy(), np.float64) / np.where(scale == 0, np.inf, scale) + zero
    away = np.abs(np.clip(wanted, 0, (1 << quantized.bits) - 1) - quantized.codes)
    where = tuple(int(i) for i in np.unravel_index(int(np.argmax(np.where(scale == 0, 0, away))), away.shape))
    assert scale[where] == 0 or away[where] <= _TIE, (
        f"weight '{job.context.weight}' is quantized to code {quantized.codes[where]} at {list(where)},"
        f" and code {round(float(wanted[where]))} would be nearer"
    )


def _check_values(
    job: QuantizationJob, quantized: QuantizedWeight, scale: npt.NDArray[np.float64], values: npt.NDArray[np.float64]
) -> None:
    """Likewise of codes that stand for the numbers of a table."""
    wanted = np.asarray(job.weight.numpy(), np.float64) / scale
    away = np.abs(wanted[..., None] - values)
    own = np.abs(wanted - values[quantized.codes])
    excess = own - away.min(axis=-1)
    where = tuple(int(i) for i in np.unravel_index(int(np.argmax(excess)), excess.shape))
    assert excess[where] <= _TIE - 0.5, (
        f"weight '{job.context.weight}' is quantized to code {quantized.codes[where]} at {list(where)},"
        f" and code {int(away[where].argmin())} would be nearer"
    )
