"""Wrong rules for what blocks of experts are made of: routers, activations, norms, quantized numbers, MoE itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from wrong_authors import CLAMPED, NORM, ROWS, WRONG, WrongRule, clip, constant, norm, softmax
from wrong_slots import SLOTS

RNG = np.random.default_rng(3)


def numbers(*shape: int) -> str:
    """A constant in the text of a graph."""
    return "{" + ", ".join(f"{number:.6g}" for number in RNG.standard_normal(shape).reshape(-1)) + "}"


FORM = {"k": 2, "activation_type": "silu", "normalize_routing_weights": 1}
WEIGHTS = f"float[3, 4, 4] w = {numbers(3, 4, 4)}, float[3, 4, 4] d = {numbers(3, 4, 4)}"


def text(before: str = "", x: str = "x", after: str = "y = Identity (m)") -> str:
    """A graph with an MoE of x and logits r."""
    form = 'k = 2, activation_type = "silu", normalize_routing_weights = 1'
    body = f"{before} m = com.microsoft.MoE <{form}> ({x}, r, w, , d) {after}"
    return f"g (float[t, 4] x, float[t, 3] r) => (float[t, 4] y) <{WEIGHTS}> {{ {body} }}"


def moe_of(op: Any, x: Any, r: Any, w: Any, d: Any, **form: Any) -> Any:
    return op.MoE(x, r, w, None, d, _domain="com.microsoft", **(FORM | form))


def moe(op: Any, x: Any, r: Any, w: Any, d: Any) -> Any:
    return moe_of(op, x, r, w, d)


def of_moe(rewrite: Callable[..., Any]) -> WrongRule:
    return WrongRule(text(), moe, rewrite)


ROUTED = f"""{ROWS.replace("4] y", "2] y")} <int64[1] k = {{2}}, int64[1] last = {{-1}}> {{
    p = Softmax (x) v, i = TopK (p, k) s = ReduceSum (v, last) y = Div (v, s) }}"""


def weights_of(op: Any, x: Any, k: Any, last: Any, score: str) -> Any:
    chosen, _ = op.TopK(getattr(op, score)(x), k, _outputs=2)
    return op.Div(chosen, op.ReduceSum(chosen, last))


def routed(op: Any, x: Any, k: Any, last: Any) -> Any:
    return weights_of(op, x, k, last, score="Softmax")


SWIGLU = """g (float[t, 4] a, float[t, 4] b) => (float[t, 4] y) <float alpha = {1.702}, float beta = {1}> {
    m = Mul (a, alpha) s = Sigmoid (m) p = Mul (a, s) q = Add (b, beta) y = Mul (p, q) }"""


def swiglu(op: Any, a: Any, b: Any, alpha: Any, beta: Any) -> Any:
    return op.Mul(op.Mul(a, op.Sigmoid(op.Mul(a, alpha))), op.Add(b, beta))


STORED = (
    f"""{ROWS} <"""
    + """uint8[4, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0},
    float[4] s = {0.1, 0.2, 0.3, 0.4}, uint8[4] z = {8, 8, 8, 8}> {
    h = DequantizeLinear <axis = 1> (w, s, z) y = MatMul (x, h) }"""
)


def stored(op: Any, x: Any, w: Any, s: Any, z: Any) -> Any:
    return op.MatMul(x, op.DequantizeLinear(w, s, z, axis=1))


def stored_in_halves(op: Any, x: Any, w: Any, s: Any, z: Any) -> Any:
    return op.MatMul(x, op.Cast(op.DequantizeLinear(w, op.Cast(s, to=10), z, axis=1), to=1))


ROUNDED = f"{ROWS} <float s = {{0.3}}> {{ r = Round (x) y = Mul (r, s) }}"
CODED = f"""{ROWS} <float s = {{0.1}}, int8 z = {{0}}> {{
    q = QuantizeLinear (x, s, z) y = DequantizeLinear (q, s, z) }}"""
BIASED = f"""{ROWS} <float[4, 4] w = {numbers(4, 4)}, float[4] b = {{0.001, 0.002, 0, 0}}> {{
    h = MatMul (x, w) y = Add (h, b) }}"""
SOFTPLUS = f"{ROWS} {{ y = Softplus (x) }}"
GROUPS = """g (float[t, 8] x) => (float[t, 4] y) <int64[3] s = {0, 4, 2}, int64[1] last = {-1}> {
    h = Reshape (x, s) y = ReduceMax <keepdims = 0> (h, last) }"""
MASKED = (
    "g (float[t, 4] x, bool[t, 4] m) => (float[t, 4] y) <float z = {-10000}> { w = Where (m, x, z) y = Softmax (w) }"
)


def coded(op: Any, x: Any, s: Any, z: Any) -> Any:
    return op.DequantizeLinear(op.QuantizeLinear(x, s, z), s, z)


def masked(op: Any, x: Any, m: Any, z: Any) -> Any:
    return op.Softmax(op.Where(m, x, z))


def permuted(op: Any, x: Any, r: Any, w: Any, d: Any) -> Any:
    order = constant(op, [1, 0, 2])
    return moe_of(op, x, r, op.Gather(w, order), op.Gather(d, order))


def other_groups(op: Any, x: Any, s: Any, last: Any) -> Any:
    return op.ReduceMax(op.Reshape(x, constant(op, [0, 2, 4])), constant(op, [1]), keepdims=0)


BLOCKS = {
    "another-k": of_moe(lambda op, x, r, w, d: moe_of(op, x, r, w, d, k=1)),
    "weights-not-normalised": of_moe(lambda op, x, r, w, d: moe_of(op, x, r, w, d, normalize_routing_weights=0)),
    "another-activation": of_moe(lambda op, x, r, w, d: moe_of(op, x, r, w, d, activation_type="gelu")),
    "experts-in-another-order": of_moe(permuted),
    "experts-turned": of_moe(lambda op, x, r, w, d: moe_of(op, x, r, op.Transpose(w, perm=[0, 2, 1]), d)),
    "softmax-twice": of_moe(lambda op, x, r, w, d: moe_of(op, x, op.Softmax(r), w, d)),
    "a-shared-expert-dropped": WrongRule(
        text(after="e = Sigmoid (x) y = Add (m, e)"),
        lambda op, x, r, w, d: op.Add(moe_of(op, x, r, w, d), op.Sigmoid(x)),
        moe,
    ),
    "tokens-scaled-after": WrongRule(
        text(before="q = Mul (x, x)", x="q"),
        lambda op, x, r, w, d: moe_of(op, op.Mul(x, x), r, w, d),
        lambda op, x, r, w, d: op.Mul(moe_of(op, x, r, w, d), x),
    ),
    "a-small-bias-ignored": WrongRule(
        BIASED, lambda op, x, w, b: op.Add(op.MatMul(x, w), b), lambda op, x, w, b: op.MatMul(x, w)
    ),
    "over-the-sequence": WrongRule(
        "g (float[b, 5, 4] x) => (float[b, 5, 4] y) { y = Softmax (x) }", softmax, lambda op, x: op.Softmax(x, axis=1)
    ),
    "routing-not-normalised": WrongRule(
        ROUTED, routed, lambda op, x, k, last: op.TopK(op.Softmax(x), k, _outputs=2)[0]
    ),
    "no-softmax-before-the-choice": WrongRule(
        ROUTED, routed, lambda op, x, k, last: weights_of(op, x, k, last, score="Identity")
    ),
    "sigmoid-for-softmax": WrongRule(
        ROUTED, routed, lambda op, x, k, last: weights_of(op, x, k, last, score="Sigmoid")
    ),
    "another-alpha": WrongRule(
        SWIGLU, swiglu, lambda op, a, b, alpha, beta: swiglu(op, a, b, constant(op, 1.7, np.float32), beta)
    ),
    "beta-forgotten": WrongRule(
        SWIGLU, swiglu, lambda op, a, b, alpha, beta: op.Mul(op.Mul(a, op.Sigmoid(op.Mul(a, alpha))), b)
    ),
    "gate-and-up-swapped": WrongRule(SWIGLU, swiglu, lambda op, a, b, alpha, beta: swiglu(op, b, a, alpha, beta)),
    "the-lower-clamp-forgotten": WrongRule(CLAMPED, clip, lambda op, x, low, high: op.Min(x, high)),
    "a-zero-point-of-7": WrongRule(
        STORED, stored, lambda op, x, w, s, z: stored(op, x, w, s, constant(op, [7] * 4, np.uint8))
    ),
    "scales-along-the-rows": WrongRule(
        STORED, stored, lambda op, x, w, s, z: op.MatMul(x, op.DequantizeLinear(w, s, z, axis=0))
    ),
    "scales-in-halves": WrongRule(STORED, stored, stored_in_halves),
    "rounded-after-it-is-scaled": WrongRule(
        ROUNDED, lambda op, x, s: op.Mul(op.Round(x), s), lambda op, x, s: op.Round(op.Mul(x, s))
    ),
    "halves-rounded-up": WrongRule(
        f"{ROWS} {{ y = Round (x) }}",
        lambda op, x: op.Round(x),
        lambda op, x: op.Floor(op.Add(x, constant(op, 0.5, np.float32))),
    ),
    "quantized-without-a-limit": WrongRule(CODED, coded, lambda op, x, s, z: op.Mul(op.Round(op.Div(x, s)), s)),
    "an-epsilon-twice-as-large": WrongRule(
        NORM, norm, lambda op, x, e, last: norm(op, x, constant(op, 2e-5, np.float32), last)
    ),
    "no-epsilon": WrongRule(NORM, norm, lambda op, x, e, last: op.Div(x, op.Sqrt(op.ReduceMean(op.Mul(x, x), last)))),
    "the-default-epsilon": WrongRule(
        "g (float[t, 8] x) => (float[t, 8] y) <float[8] s = " + numbers(8) + "> {"
        " y = LayerNormalization <epsilon = 0.000002> (x, s) }",
        lambda op, x, s: op.LayerNormalization(x, s, _allow_other_attributes=True),
        lambda op, x, s: op.LayerNormalization(x, s, epsilon=1e-6),
    ),
    "other-groups": WrongRule(
        GROUPS, lambda op, x, s, last: op.ReduceMax(op.Reshape(x, s), last, keepdims=0), other_groups
    ),
    "truncated-not-floored": WrongRule(
        f"{ROWS} {{ y = Floor (x) }}", lambda op, x: op.Floor(x), lambda op, x: op.Cast(op.Cast(x, to=7), to=1)
    ),
    "softplus-that-overflows": WrongRule(
        SOFTPLUS,
        lambda op, x: op.Softplus(x),
        lambda op, x: op.Log(op.Add(op.Exp(x), constant(op, 1, np.float32))),
    ),
    "softplus-that-is-0": WrongRule(SOFTPLUS, lambda op, x: op.Softplus(x), lambda op, x: op.Relu(x)),
    "a-mask-that-is-added": WrongRule(
        MASKED, masked, lambda op, x, m, z: op.Softmax(op.Add(x, op.Where(m, constant(op, 0, np.float32), z)))
    ),
}
"""Name -> a wrong rule."""

ALL = WRONG | BLOCKS | SLOTS
