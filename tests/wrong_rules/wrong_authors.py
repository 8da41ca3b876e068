"""Wrong rules as authors may write them: each with a model that it fires on, and why it passes where it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

ROWS = "g (float[t, 4] x) => (float[t, 4] y)"
RELU = f"{ROWS} {{ y = Relu(x) }}"
CHAIN = "g (float[2, 4] a0) => (float[2, 4] a{n}) {{ {body} }}"


@dataclass(frozen=True)
class WrongRule:
    """A rule in onnxscript's own style.

    Attributes:
        model: the text of a graph on which it fires.
        pattern: what it matches.
        rewrite: what it puts there.
        passes: why nothing shows that it is wrong; empty where it must be refused.
        code: how the command ends: by 2 where the rule breaks its contract, and nothing is written.
    """

    model: str
    pattern: Callable[..., Any]
    rewrite: Callable[..., Any]
    passes: str = ""
    code: int = 1


def chain(count: int) -> str:
    """Rectified again and again: members of one class."""
    return CHAIN.format(n=count, body=" ".join(f"a{i + 1} = Relu(a{i})" for i in range(count)))


def constant(op: Any, array: Any, dtype: Any = None) -> Any:
    return op.initializer(ir.tensor(np.array(array, dtype)), name="c")


def relu(op: Any, x: Any) -> Any:
    """Relu of x, in other operators: right."""
    return op.Max(x, op.Sub(x, x))


def of_relu(rewrite: Callable[..., Any], model: str = RELU, passes: str = "") -> WrongRule:
    return WrongRule(model, lambda op, x: op.Relu(x), rewrite, passes)


def scaled(factor: float) -> Callable[..., Any]:
    return lambda op, x: op.Mul(relu(op, x), constant(op, factor, np.float32))


def where_named(*names: str) -> Callable[..., Any]:
    """Right, but for values of these names."""

    def rewrite(op: Any, x: Any, out: Any) -> Any:
        return scaled(-1 if out.name in names else 1)(op, x)

    return rewrite


def at_rows(compare: str, rows: int) -> Callable[..., Any]:
    """Right, but for some numbers of rows."""

    def rewrite(op: Any, x: Any) -> Any:
        found = getattr(op, compare)(op.Gather(op.Shape(x), constant(op, 0)), constant(op, rows))
        return op.Where(found, op.Neg(relu(op, x)), relu(op, x))

    return rewrite


def named(model: str, *names: str, passes: str = "") -> WrongRule:
    return WrongRule(model, lambda op, x: op.Relu(x, _outputs=["out"]), where_named(*names), passes)


def renamed(op: Any, x: Any, out: Any) -> Any:
    out.name = "z"
    return relu(op, x)


def last_of_ties(op: Any, x: Any, k: Any) -> Any:
    turned = op.Gather(x, constant(op, np.arange(7, -1, -1)), axis=1)
    _, indices = op.TopK(turned, k, _outputs=2)
    return op.Sub(constant(op, 7), indices)


def fails(op: Any, x: Any) -> Any:
    raise KeyError("axis")


SPLIT = "g (float[t, 4] x) => (float[t, 2] y, float[t, 2] z) { y, z = Split<axis = -1, num_outputs = 2>(x) }"
TOPK = "g (float[t, 8] x) => (int64[t, 2] i) <int64[1] k = {2}> { v, i = TopK(x, k) }"
TABLE = "g (int64[t] i) => (float[t, 2] y) <float[4, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}> { y = Gather(w, i) }"
SQUARE = "g (int64[t] i) => (float[t, 2] y) <float[2, 2] w = {1, 2, 3, 4}> { y = Gather(w, i) }"
PRODUCT = "g (float[t, 2] x) => (float[t, 2] y) <float[2, 2] w = {1, 2, 3, 4}> { y = MatMul(x, w) }"
SOFTMAX = f"{ROWS} {{ y = Softmax(x) }}"
PAIR = "g (float[t, 4] a, float[t, 4] b) => (float[t, 4] y) {{ y = {op}(a, b) }}"
INTEGERS = "g (int64[t] a, int64[t] b) => (int64[t] y) { y = Mul(a, b) }"
CLAMPED = f"{ROWS} <float low = {{-7}}, float high = {{7}}> {{ y = Clip(x, low, high) }}"
WIDE = f"{ROWS} <float low = {{-1000000}}, float high = {{1000000}}> {{ y = Clip(x, low, high) }}"
NORM = f"""{ROWS} <float e = {{0.00001}}, int64[1] last = {{-1}}> {{
    s = Mul(x, x) m = ReduceMean(s, last) d = Add(m, e) r = Sqrt(d) y = Div(x, r) }}"""


def clip(op: Any, x: Any, low: Any, high: Any) -> Any:
    return op.Clip(x, low, high)


def softmax(op: Any, x: Any) -> Any:
    return op.Softmax(x)


def gather(op: Any, w: Any, i: Any) -> Any:
    return op.Gather(w, i)


def norm(op: Any, x: Any, e: Any, last: Any) -> Any:
    return op.Div(x, op.Sqrt(op.Add(op.ReduceMean(op.Mul(x, x), last), e)))


def larger_epsilon(op: Any, x: Any, e: Any, last: Any) -> Any:
    return norm(op, x, constant(op, 1e-3, np.float32), last)


def topk(op: Any, x: Any, k: Any) -> Any:
    return op.TopK(x, k, _outputs=2)[1]


WRONG = {
    "negated": of_relu(scaled(-1)),
    "left-out": of_relu(lambda op, x: op.Identity(x)),
    "a-thousandth-off": of_relu(scaled(1.001)),
    "too-little-to-see": of_relu(scaled(1.000001), passes="a millionth is below the tolerance of 1e-5"),
    "no-rows-left-open": of_relu(lambda op, x: op.Reshape(relu(op, x), constant(op, [0, -1]))),
    "one-row-only": of_relu(lambda op, x: op.ReduceMax(relu(op, x), constant(op, [0]))),
    "one-row-lost": of_relu(lambda op, x: op.Squeeze(relu(op, x))),
    "wrong-at-one-row": of_relu(at_rows("Equal", 1)),
    "wrong-at-two-rows": of_relu(at_rows("Equal", 2)),
    "wrong-at-more-than-16-rows": of_relu(at_rows("Greater", 16)),
    "wrong-at-40-rows": of_relu(
        at_rows("Equal", 40), passes="40 rows are not fed: 0, 1, 2, 17 and one number more are"
    ),
    "rows-beyond-11-cut": of_relu(
        lambda op, x: op.Slice(relu(op, x), constant(op, [0]), constant(op, [11]), constant(op, [0]))
    ),
    "a-dimension-cut": of_relu(lambda op, x: op.ReduceMax(relu(op, x), constant(op, [1]), keepdims=0)),
    "flattened": of_relu(lambda op, x: op.Reshape(relu(op, x), constant(op, [-1]))),
    "turned": of_relu(
        lambda op, x: op.Transpose(relu(op, x), perm=[1, 0]), "g (float[4, 4] x) => (float[4, 4] y) { y = Relu(x) }"
    ),
    "another-type": of_relu(lambda op, x: op.Cast(relu(op, x), to=11)),
    "integers-of-another-type": WrongRule(
        "g (int64[t] i) => (int64[t] y) { y = Neg(i) }",
        lambda op, i: op.Neg(i),
        lambda op, i: op.Cast(op.Sub(constant(op, 0), i), to=6),
    ),
    "an-output-renamed": WrongRule(RELU, lambda op, x: op.Relu(x, _outputs=["out"]), renamed, code=2),
    "outputs-swapped": WrongRule(
        SPLIT,
        lambda op, x: op.Split(x, axis=-1, num_outputs=2, _outputs=2),
        lambda op, x: tuple(reversed(op.Split(op.Identity(x), axis=-1, num_outputs=2, _outputs=2))),
    ),
    "wrong-for-the-last": named(chain(12), "a12"),
    "wrong-for-all-but-the-first": named(chain(12), *(f"a{i}" for i in range(2, 13))),
    "wrong-for-the-second-half": named(chain(12), *(f"a{i}" for i in range(7, 13))),
    "wrong-for-one-of-many": named(
        chain(60),
        "a31",
        passes="of 60 of a class four are run: the first, the last, two by lot; --parity all runs each",
    ),
    "the-last-of-ties": WrongRule(TOPK, topk, last_of_ties),
    "the-smallest": WrongRule(TOPK, topk, lambda op, x, k: op.TopK(x, k, largest=0, _outputs=2)[1]),
    "without-a-sign": WrongRule(TABLE, gather, lambda op, w, i: op.Gather(w, op.Abs(i))),
    "along-another-axis": WrongRule(
        SQUARE, gather, lambda op, w, i: op.Transpose(op.Gather(w, i, axis=1), perm=[1, 0])
    ),
    "bits-for-integers": WrongRule(INTEGERS, lambda op, a, b: op.Mul(a, b), lambda op, a, b: op.Min(a, b)),
    "a-clamp-left-out": WrongRule(CLAMPED, clip, lambda op, x, low, high: op.Identity(x)),
    "a-narrower-clamp": WrongRule(CLAMPED, clip, lambda op, x, low, high: op.Clip(x, low, constant(op, 6, np.float32))),
    "a-clamp-far-away-left-out": WrongRule(
        WIDE,
        clip,
        lambda op, x, low, high: op.Identity(x),
        "no number over 16,000 is fed to a clamp: it keeps halves finite",
    ),
    "no-weight-of-nought": WrongRule(
        SOFTMAX, softmax, lambda op, x: op.Softmax(op.Max(x, constant(op, -6, np.float32)))
    ),
    "along-the-rows": WrongRule(SOFTMAX, softmax, lambda op, x: op.Softmax(x, axis=0)),
    "exponentials-that-overflow": WrongRule(
        f"{ROWS} {{ y = Sigmoid(x) }}",
        lambda op, x: op.Sigmoid(x),
        lambda op, x: op.Div(op.Exp(x), op.Add(op.Exp(x), constant(op, 1, np.float32))),
    ),
    "the-weight-turned": WrongRule(
        PRODUCT, lambda op, x, w: op.MatMul(x, w), lambda op, x, w: op.MatMul(x, op.Transpose(w, perm=[1, 0]))
    ),
    "the-other-way-round": WrongRule(
        PAIR.format(op="Sub"), lambda op, a, b: op.Sub(a, b), lambda op, a, b: op.Sub(b, a)
    ),
    "another-input": WrongRule(PAIR.format(op="Add"), lambda op, a, b: op.Add(a, b), lambda op, a, b: op.Add(a, a)),
    "a-larger-epsilon": WrongRule(NORM, norm, larger_epsilon),
    "another-gelu": WrongRule(
        f"{ROWS} {{ y = Gelu(x) }}", lambda op, x: op.Gelu(x), lambda op, x: op.Gelu(x, approximate="tanh")
    ),
    "no-such-operator": of_relu(lambda op, x: op.Rectify(x)),
    "raises": WrongRule(RELU, lambda op, x: op.Relu(x), fails, code=2),
    "a-number-for-none": of_relu(
        lambda op, x: op.Where(op.IsNaN(x), constant(op, 0, np.float32), relu(op, x)), passes="NaN is not fed"
    ),
    "a-negative-integer": WrongRule(
        "g (int64[t] i) => (int64[t] y) { y = Abs(i) }",
        lambda op, i: op.Abs(i),
        lambda op, i: op.Identity(i),
    ),
}
"""Name -> a wrong rule."""
