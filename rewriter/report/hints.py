"""What would have to change for a rule to fire: one hint for each common reason of a decline, as data.

These are for the shipped rules. A rule of another package says in the reason itself what to do about it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Hint:
    """What to do about a reason.

    Attributes:
        reason: regular expression that is searched in the reason of a decline.
        advice: what would have to change.
        expected: whether the rule set means it so, or the rule is about other weights, so that nothing is amiss.
    """

    reason: str
    advice: str
    expected: bool = False


HINTS = (
    Hint(r"not included by the plan", "add its role or name to quantization.include of the rule set", expected=True),
    Hint(r"excluded by the plan", "take its role or name out of quantization.exclude of the rule set", expected=True),
    Hint(
        r"different specs|gives expert|of different bits",
        "give all experts of a layer one spec: overrides by role and layer",
    ),
    Hint(r"rule unstack", "run rule unstack in an earlier phase (extends: unstack)"),
    Hint(r"quantized already", "start from the float model, or run rule qmoe-to-moe before"),
    Hint(r"also reads it|is also read by", "give the other reader a copy of its own, or remove it"),
    Hint(r"is a graph output", "take it off the graph's outputs"),
    Hint(r"still read whole", "remove what reads the whole stack, or leave it stacked and fuse the block"),
    Hint(r"block size", "choose a block size that divides it: --set quantization.default.block_size=32"),
    Hint(r"runs .* bits, not", "choose a width that the target runs: --set quantization.default.bits=4"),
    Hint(r"has no bfloat16", "export in float16, or rewrite for a target with the kernel: --target cuda"),
    Hint(r"min_bytes", "lower the rule's option min_bytes"),
    Hint(
        r"on target|target \S+ (has no|reads)",
        "rewrite for another --target, or by experts-int4, which needs MatMulNBits alone",
    ),
    Hint(
        r"is missing|mixed in (twice|for)|experts, and there are",
        "export the block whole: each expert once, under one router",
    ),
    Hint(
        r"has no activation|added to the sum|neither softmax nor",
        "the operator computes something else: quantize the experts one by one (experts-int4)",
    ),
    Hint(
        r"before they are normalised|are divided by|are scaled",
        "the operator weighs experts otherwise: quantize them one by one (experts-int4)",
    ),
    Hint(
        r"(rank|shape|element type) of .* unknown|rank .* unknown",
        "infer shapes before: onnx.shape_inference, or export with them",
    ),
    Hint(
        r"not constant|depends? on an input|is not static",
        "make it constant (static expert indices, folded constants), or fuse the block whole (rule set fuse-experts)",
    ),
    Hint(r"set by the caller", "inline the function: onnx.inliner"),
    Hint(
        r"; the operator takes|and its input|and the input|only floats", "export in one float type: float32 or float16"
    ),
    Hint(r"on the left", "write the product as x @ w, with the weight on the right"),
    Hint(r"more than one matrix", "a batched product stays as it is, unless its block is fused (rule fuse-experts)"),
    Hint(r"^(transA|alpha|beta)\b", "fold it into the weight, or write a plain MatMul"),
    Hint(r"not tied|no embedding", "nothing: the rule is about other weights", expected=True),
)
"""The first that fits is given."""


def hint(reason: str) -> Hint | None:
    """Returns what is known about a reason; None where nothing is."""
    return next((known for known in HINTS if re.search(known.reason, reason)), None)
