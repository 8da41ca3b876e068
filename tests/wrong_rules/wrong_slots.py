"""Wrong rules for quantized numbers, integers and names: slots swapped, axes mixed up, right for one type only."""

from __future__ import annotations

from typing import Any

import numpy as np
from wrong_authors import ROWS, WrongRule, constant

ZEROS = f"""{ROWS} <uint8[4, 4] w = {{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0}},
    float[4] s = {{0.1, 0.2, 0.3, 0.4}}, uint8[4] z = {{8, 7, 9, 8}}> {{
    h = DequantizeLinear <axis = 1> (w, s, z) y = MatMul (x, h) }}"""
BLOCKED = f"""{ROWS} <int8[4, 4] w = {{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0}},
    float[2, 4] s = {{0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8}}> {{
    h = DequantizeLinear <axis = 0, block_size = 2> (w, s) y = MatMul (x, h) }}"""
SCALED = f"""{ROWS} <float[4, 4] w = {{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0}},
    float[4, 4] s = {{1, 2, 3, 4, 2, 1, 2, 3, 3, 2, 1, 2, 4, 3, 2.5, 1}}> {{
    h = Mul (w, s) y = MatMul (x, h) }}"""
INTEGER = """g (uint8[t, 4] x) => (int32[t, 4] y) <uint8 a = {2}, uint8 b = {3},
    uint8[4, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0}> { y = MatMulInteger (x, w, a, b) }"""
TWO_SCALES = """g (int8[t, 4] x) => (float[t, 4] y) <
    int8[4, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0},
    float s = {0.1}, float[4] r = {0.1, 0.2, 0.3, 0.4}> {
    a = DequantizeLinear (x, s) b = DequantizeLinear <axis = 0> (w, r) y = MatMul (a, b) }"""
BEST = "g (float[t, 4] x) => (int64[t, 1] y) { y = ArgMax <axis = -1> (x) }"
HALVES = """g (float16[t, 4] x) => (float16[t, 4] y) <float e = {0.000000001}, int64[1] last = {-1}> {
    f = Cast <to = 1> (x) n = ReduceL2 (f, last) m = Max (n, e) q = Div (f, m) y = Cast <to = 10> (q) }"""
LAYERS = """g (float[t, 4] x) => (float[t, 4] y) <
    float[4, 4] u = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0},
    float[4, 4] v = {0, 2, 1, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0}> { a = MatMul (x, u) y = MatMul (a, v) }"""
FLOORED = "g (int64[t] i) => (int64[t] y) <int64 n = {3}> { m = Mod (i, n) y = Abs (m) }"
HALF = "g (int64[t] i) => (int64[t] y) <int64 n = {2}> { y = Div (i, n) }"
SPLIT = "g (float[t, 4] x) => (float[t, 2] y, float[t, 2] z) { y, z = Split<axis = -1, num_outputs = 2>(x) }"


def dequantized(op: Any, x: Any, w: Any, s: Any, z: Any) -> Any:
    return op.MatMul(x, op.DequantizeLinear(w, s, z, axis=1))


def normed(op: Any, x: Any, e: Any, last: Any) -> Any:
    wide = op.Cast(x, to=1)
    return op.Cast(op.Div(wide, op.Max(op.ReduceL2(wide, last), e)), to=10)


def normed_in_halves(op: Any, x: Any, e: Any, last: Any) -> Any:
    return op.Div(x, op.Max(op.ReduceL2(x, last), op.Cast(e, to=10)))


class First:
    """Keeps the weight of the first application for all."""

    weight: Any = None

    def __call__(self, op: Any, x: Any, w: Any) -> Any:
        if First.weight is None or w.name == "u":
            First.weight = w.const_value
        return op.MatMul(op.Identity(x), op.initializer(First.weight, name="v"))


SLOTS = {
    "zero-points-of-other-columns": WrongRule(
        ZEROS, dequantized, lambda op, x, w, s, z: dequantized(op, x, w, s, op.Gather(z, constant(op, [0, 2, 1, 3])))
    ),
    "blocks-along-the-other-axis": WrongRule(
        BLOCKED,
        lambda op, x, w, s: op.MatMul(x, op.DequantizeLinear(w, s, axis=0, block_size=2)),
        lambda op, x, w, s: op.MatMul(x, op.DequantizeLinear(w, op.Transpose(s, perm=[1, 0]), axis=1, block_size=2)),
    ),
    "scales-turned": WrongRule(
        SCALED,
        lambda op, x, w, s: op.MatMul(x, op.Mul(w, s)),
        lambda op, x, w, s: op.MatMul(x, op.Mul(w, op.Transpose(s, perm=[1, 0]))),
    ),
    "zero-points-in-each-others-slots": WrongRule(
        INTEGER,
        lambda op, x, w, a, b: op.MatMulInteger(x, w, a, b),
        lambda op, x, w, a, b: op.MatMulInteger(x, w, b, a),
    ),
    "scales-of-rows-behind-the-product": WrongRule(
        TWO_SCALES,
        lambda op, x, w, s, r: op.MatMul(op.DequantizeLinear(x, s), op.DequantizeLinear(w, r, axis=0)),
        lambda op, x, w, s, r: op.Mul(op.Cast(op.MatMulInteger(x, w), to=1), op.Mul(s, r)),
    ),
    "the-last-of-the-best": WrongRule(
        BEST, lambda op, x: op.ArgMax(x, axis=-1), lambda op, x: op.ArgMax(x, axis=-1, select_last_index=1)
    ),
    "an-epsilon-that-is-none-in-halves": WrongRule(HALVES, normed, normed_in_halves),
    "the-first-weight-for-all": WrongRule(LAYERS, lambda op, x, w: op.MatMul(x, w), First()),
    "a-remainder-of-the-magnitude": WrongRule(
        FLOORED, lambda op, i, n: op.Abs(op.Mod(i, n)), lambda op, i, n: op.Mod(op.Abs(i), n)
    ),
    "half-by-shifting": WrongRule(
        HALF,
        lambda op, i, n: op.Div(i, n),
        lambda op, i, n: op.Cast(
            op.BitShift(op.Cast(i, to=13), op.Cast(constant(op, 1), to=13), direction="RIGHT"), to=7
        ),
    ),
    "an-output-of-two-dropped": WrongRule(
        SPLIT,
        lambda op, x: op.Split(x, axis=-1, num_outputs=2, _outputs=2),
        lambda op, x: op.Slice(x, constant(op, [0]), constant(op, [2]), constant(op, [1])),
        code=2,
    ),
    "a-zero-without-its-sign": WrongRule(
        f"{ROWS} {{ y = Neg (x) }}",
        lambda op, x: op.Neg(x),
        lambda op, x: op.Sub(constant(op, 0, np.float32), x),
        "minus zero equals zero",
    ),
    "in-no-order": WrongRule(
        f"{ROWS.replace('4] y', '3] y')} <int64[1] k = {{3}}> {{ y, i = TopK (x, k) }}",
        lambda op, x, k: op.TopK(x, k, _outputs=2)[0],
        lambda op, x, k: op.TopK(x, k, sorted=0, _outputs=2)[0],
    ),
    "an-operator-of-a-later-opset": WrongRule(
        f"{ROWS} {{ y = Erf (x) }}", lambda op, x: op.Erf(x), lambda op, x: op.Swish(x)
    ),
}
"""Name -> a wrong rule."""
