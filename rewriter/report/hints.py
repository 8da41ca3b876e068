"""What would have to change for a rule to fire: what the rule says, else a hint for each common reason, as data."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from types import FunctionType


class Reason(str):
    """Why a rule declined, with what helps: onnxscript hands on a failure's reason and sources, and nothing else.

    Attributes:
        remedy: what would have to change; empty where the rule does not say.
    """

    remedy: str

    def __new__(cls, text: str, remedy: str = "") -> Reason:
        """Keeps the remedy that a text brings, where none is given."""
        made = super().__new__(cls, text)
        made.remedy = remedy or (text.remedy if isinstance(text, Reason) else "")
        return made


def is_shipped(part: object) -> bool:
    """Whether a rule or a recogniser is this project's own; others may mean other things by the same words."""
    module = part.__module__ if isinstance(part, FunctionType) else type(part).__module__
    return module.startswith("rewriter.rules.")


@dataclass(frozen=True)
class Hint:
    """What to do about a reason.

    Attributes:
        reason: regular expression that is searched in the reason of a decline.
        advice: what would have to change.
        expected: whether the rule set means it so, or the rule is about other weights, so that nothing is amiss.
        rules: the rules whose reason it is; empty for any.
    """

    reason: str
    advice: str
    expected: bool = False
    rules: tuple[str, ...] = ()


PLAN = (
    Hint(r"^not included by the plan", "add its role or name to quantization.include of the rule set", expected=True),
    Hint(r"^excluded by the plan", "take its role or name out of quantization.exclude of the rule set", expected=True),
)
"""What the plan says to every rule that asks it."""

_TARGET = r"on target|target \S+ (has no|reads)"

_CUDA = "CUDA has it from ONNX Runtime 1.32 on: export in float16 and rewrite for --target cuda:sm80@1.32"

HINTS = (
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
    Hint(r"runs .* bits, not|bits have no kernel", "choose a width that runs: --set quantization.default.bits=4"),
    Hint(r"\b(float|double|bfloat16) has no kernel", "export in float16, which every kernel runs"),
    Hint(
        r"activation '(geglu|relu2)' has no kernel",
        f"{_CUDA}; or export the experts unrolled, and each matrix becomes a MatMulNBits",
        rules=("moe-to-qmoe",),
    ),
    Hint(r"activation '(geglu|relu2)' has no kernel", _CUDA),
    Hint(r"unless an architecture is named", "name it: --target cuda:sm80 or cuda:sm90"),
    Hint(r"min_bytes", "lower the rule's option min_bytes"),
    Hint(
        _TARGET,
        "rewrite for another --target, or by experts-int4, which needs MatMulNBits alone",
        rules=("fuse-experts",),
    ),
    Hint(
        _TARGET,
        "rewrite for another --target, or export the experts unrolled, and each matrix becomes a MatMulNBits",
        rules=("moe-to-qmoe",),
    ),
    Hint(_TARGET, "rewrite for another --target"),
    Hint(
        r"^the trace fixed",
        "export with the experts unrolled or batched, with no loop over those that the example input hit",
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
        "make it constant (static expert indices, folded constants); experts that are chosen at run time can only be"
        " fused whole, by rule fuse-experts",
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
"""What the shipped rules say; the first that fits is given."""


@functools.lru_cache(maxsize=4096)
def hint(rule: str, reason: str, *, shipped: bool) -> Hint | None:
    """Returns what is known about a reason; None where nothing is.

    Args:
        rule: name of the rule that gave it; empty for a recogniser.
        reason: why it declined.
        shipped: whether it is one of this project's.
    """
    table: tuple[Hint, ...] = (*PLAN, *HINTS) if shipped else PLAN
    for known in table:
        if (not known.rules or rule in known.rules) and re.search(known.reason, reason):
            return known
    return None


def remedy(rule: str, reason: str, *, shipped: bool) -> str:
    """Returns what helps: what the rule itself says, else the hint; empty where nothing is known."""
    own = reason.remedy if isinstance(reason, Reason) else ""
    known = None if own else hint(rule, reason, shipped=shipped)
    return known.advice if known else own
