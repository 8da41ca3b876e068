"""Wrong versions of what is known of mxfp4, nvfp4, 3 bits and weights that lie on a grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from mistakes import Mistake
from moe_models import moe_model
from shown import FUSED, Models, drawn, moes, qmoes, ruled

TO_QMOE, LAYOUT, TO_MOE = "moe-to-qmoe", "qmoe-layout", "qmoe-to-moe"
PACKING, LAYOUTS = "rewriter/operators/layout/packing.py", "rewriter/operators/layout/stored.py"
TYPES, LOSSLESS = "rewriter/quantize/types.py", "rewriter/quantize/lossless.py"
RULE = "rules/blocks/qmoe.py"

halves: dict[str, Any] = {"dtype": np.float16, "bias": "none"}
mxfp4, nvfp4 = ruled(TO_QMOE, format="mxfp4"), ruled(TO_QMOE, format="nvfp4")
three = ruled(TO_QMOE, bits=3)
kept = ruled(TO_QMOE, algorithm=["lossless", "rtn"])


E2M1 = (-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6)


def born(values: Sequence[float] = E2M1, digits: int = 1) -> Models:
    """An MoE whose experts lie on a grid: values times scales of so many binary digits."""
    model = moe_model(FUSED, dtype=np.float16, hidden=32, inter=32, experts=3, bias="none")
    for position, tensor in enumerate(model.graph.initializer):
        rng, shape = np.random.default_rng(position), tuple(tensor.dims)
        array = rng.choice(values, shape).astype(np.float16) / 8
        array[..., ::8], array[..., 1::8] = values[-1] / 8, values[0] / 8
        scales = rng.integers(1 << (digits - 1), 1 << digits, (*shape[:-1], 2)) / (1 << (digits - 1))
        scales *= 2.0 ** rng.integers(-2, 3, (*shape[:-1], 1))
        array *= np.repeat(scales if digits == 4 else scales[..., :1].repeat(2, axis=-1), 16, axis=-1).astype(
            np.float16
        )
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    return lambda: drawn(model)


FORMATS = (
    Mistake(
        TO_QMOE,
        "mxfp4: low and high nibble swapped",
        LAYOUTS,
        [
            ("return pack_codes(codes, bits)", "return (lambda p: p << 4 | p >> 4)(pack_codes(codes, bits))"),
            ("return unpack_codes(packed, shape", "return unpack_codes(packed << 4 | packed >> 4, shape"),
        ],
        moes(**halves),
        mxfp4,
    ),
    Mistake(
        TO_QMOE,
        "mxfp4: exponent off by one",
        TYPES,
        [("np.float32(self.global_scale)", "np.float32(2 * self.global_scale)")],
        moes(**halves),
        mxfp4,
    ),
    Mistake(
        TO_QMOE,
        "nvfp4: global scale twice",
        LAYOUTS,
        [
            ("np.array(weight.global_scale, np.float32)", "np.array(weight.global_scale**2, np.float32)"),
            ("float(np.asarray(zeros[0]).reshape(()))", "float(np.float32(np.asarray(zeros[0]).reshape(()) ** 0.5))"),
        ],
        moes(**halves),
        nvfp4,
    ),
    Mistake(
        TO_QMOE,
        "nvfp4: scales of e4m3 written as e5m2",
        "rewriter/quantize/four_bit_floats.py",
        [("scales.view(own.scale_dtype)", "scales.view(ml_dtypes.float8_e5m2)")],
        moes(**halves),
        nvfp4,
    ),
    Mistake(
        TO_QMOE,
        "nvfp4: the global scale of fc1 in the slot of fc2",
        RULE,
        [("dict(zip(parts, map", "dict(zip((*parts[:2], 31 - parts[2]), map")],
        moes(**halves),
        nvfp4,
    ),
    Mistake(
        TO_QMOE,
        "mxfp4 called nvfp4",
        RULE,
        [('found["quant_type"] = QUANT_TYPES[own]', 'found["quant_type"] = "nvfp4"')],
        moes(**halves),
        mxfp4,
    ),
    Mistake(
        TO_QMOE,
        "float codes called raw as integers are",
        RULE,
        [("prepacked_attribute(target, held.layout, own)", "prepacked_attribute(target, held.layout)")],
        moes(**halves),
        mxfp4,
    ),
    Mistake(
        TO_QMOE,
        "3 bits: most significant code first",
        PACKING,
        [
            ("-1, 8) << _TOGETHER", "-1, 8) << _TOGETHER[::-1]"),
            ("words >> _TOGETHER", "words >> _TOGETHER[::-1]"),
        ],
        moes(**halves),
        three,
    ),
    Mistake(
        TO_QMOE,
        "3 bits: zero point of 4 bits",
        TYPES,
        [("np.float32(1 << (bits - 1)) if", "np.float32(8) if")],
        moes(**halves),
        three,
    ),
    Mistake(
        TO_QMOE,
        "lossless: exponent off by one",
        LOSSLESS,
        [("powers.view(ml_dtypes", "(powers + 1).view(ml_dtypes")],
        born(),
        kept,
    ),
    Mistake(
        TO_QMOE,
        "lossless: scales of the row before",
        LOSSLESS,
        [("powers.view(ml_dtypes", "np.roll(powers, 1, axis=0)[:, ::-1].copy().view(ml_dtypes")],
        born(),
        kept,
    ),
    Mistake(
        TO_QMOE,
        "lossless, nvfp4: global scale doubled",
        LOSSLESS,
        [("return Read(made)", "return Read(replace(made, global_scale=2 * made.global_scale))")],
        born(digits=4),
        kept,
    ),
    Mistake(
        TO_QMOE,
        "lossless, nvfp4: e4m3 read as e5m2",
        LOSSLESS,
        [("return Read(made)", "return Read(replace(made, scales=made.scales.view(ml_dtypes.float8_e5m2)))")],
        born(digits=4),
        kept,
    ),
    Mistake(
        TO_QMOE,
        "lossless, integers: neighbours of codes",
        LOSSLESS,
        [
            (
                "return Read(QuantizedWeight(codes, scales, None if",
                "return Read(QuantizedWeight(codes ^ 1, scales, None if",
            )
        ],
        born(range(-8, 8), digits=7),
        kept,
    ),
    Mistake(
        TO_QMOE,
        "lossless, integers: scales of the row before",
        LOSSLESS,
        [
            (
                "return Read(QuantizedWeight(codes, scales, None if",
                "return Read(QuantizedWeight(codes, np.roll(scales, 1, axis=0), None if",
            )
        ],
        born(range(-8, 8), digits=7),
        kept,
    ),
    Mistake(
        TO_MOE,
        "the global scale read twice",
        LAYOUTS,
        [("float(np.asarray(zeros[0]).reshape(()))", "float(np.asarray(zeros[0]).reshape(()) ** 2)")],
        qmoes({"format": "nvfp4"}, **halves),
    ),
    Mistake(
        LAYOUT,
        "float codes moved and not turned",
        LAYOUTS,
        [("pack_codes(np.ascontiguousarray(codes.T), bits)", "pack_codes(codes, bits).reshape(codes.shape[1], -1)")],
        qmoes({"format": "nvfp4"}, **halves),
        ruled({LAYOUT: {"layout": "columns"}}, target="cuda@1.31"),
    ),
)
