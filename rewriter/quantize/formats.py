"""Formats of codes: integers times a scale, and the four-bit floats of mxfp4 and nvfp4.

Source: OCP Microscaling Formats (MX) 1.0 for e2m1, e8m0 and mxfp4; e4m3 scales of blocks of 16 for nvfp4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np

FormatName = Literal["int", "mxfp4", "nvfp4"]

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = (*_MAGNITUDES, *(-value for value in _MAGNITUDES))
"""What each of the 16 codes of e2m1 stands for; the fourth bit is the sign, of zero too."""


@dataclass(frozen=True)
class Format:
    """What codes and their scales are.

    Attributes:
        name: as a plan has it.
        widths: bits of a code.
        values: what each code stands for; None for integers, which stand for ``code - zero_point``.
        block: input features per scale, where the format says it; else None.
        scale_dtype: of the scales, where the format says it; else the activations' own.
        global_scale: whether a weight has one more scale, in float32, that multiplies all others.
    """

    name: FormatName
    widths: tuple[int, ...]
    values: tuple[float, ...] | None = None
    block: int | None = None
    scale_dtype: np.dtype[np.generic] | None = None
    global_scale: bool = False


INT = Format("int", (2, 3, 4, 8))
MXFP4 = Format("mxfp4", (4,), E2M1, 32, np.dtype(ml_dtypes.float8_e8m0fnu), global_scale=True)
NVFP4 = Format("nvfp4", (4,), E2M1, 16, np.dtype(ml_dtypes.float8_e4m3fn), global_scale=True)
FORMATS: Mapping[str, Format] = {known.name: known for known in (INT, MXFP4, NVFP4)}
"""By name."""
