"""How a rule says no: a reason, the node or value at fault, what would help, and whether it was to be expected."""

from __future__ import annotations

import onnx_ir as ir

from rewriter.graph._onnxscript import MatchFailureError


class Reason(str):
    """Why a rule declined, with what helps: onnxscript hands on a failure's reason and sources, and nothing else.

    Attributes:
        remedy: what the user would have to change; empty where nothing is known.
        expected: whether the rule set means it so, or the rule is about other weights, so that nothing is amiss.
    """

    remedy: str
    expected: bool

    def __new__(cls, text: str, remedy: str = "", *, expected: bool = False) -> Reason:
        """Keeps what a text brings, where nothing is given."""
        made = super().__new__(cls, text)
        brought = text if isinstance(text, Reason) else None
        made.remedy = remedy or (brought.remedy if brought else "")
        made.expected = expected or (brought.expected if brought else False)
        return made


class Declined(MatchFailureError):  # noqa: N818 -- no error: a decline is data
    """The rule is about this, and must not touch it: the reason and the node or value at fault reach the report."""

    def __init__(
        self,
        reason: str,
        culprit: ir.Node | ir.Value | None = None,
        *,
        remedy: str = "",
        expected: bool = False,
    ) -> None:
        """Says why.

        Args:
            reason: why not, with the value that shows it.
            culprit: the node or value at fault; by default the node at which the pattern matched.
            remedy: what the user would have to change for the rule to fire; by default what the reason brings.
            expected: whether the rule is about other weights, so that nothing is amiss.
        """
        if not reason:
            raise ValueError("Declined needs a reason; raise NotApplicable where there is none to report")
        super().__init__(Reason(reason, remedy, expected=expected), *(() if culprit is None else (culprit,)))


class NotApplicable(MatchFailureError):  # noqa: N818 -- no error either
    """The pattern is there, but what it shows is not what the rule is about: nothing to report."""

    def __init__(self) -> None:
        super().__init__("")


def reason_of(failure: str) -> Reason:
    """Returns the reason of a failed match; one that onnxscript or a plain onnxscript rule gave has no remedy."""
    return failure if isinstance(failure, Reason) else Reason(failure)


def stays_float(reader: ir.Node | ir.Value, what: str = "the float weight") -> Declined:
    """Returns the decline of a rewrite after which a weight would be stored twice: as it was, and quantized.

    Args:
        reader: what reads it besides; the value itself where that is a graph output.
        what: the weight.
    """
    if isinstance(reader, ir.Value):
        return Declined(f"{what} would stay in the model: it is a graph output", reader, remedy=NOT_AN_OUTPUT)
    return Declined(f"{what} would stay in the model: {reader.op_type} also reads it", reader, remedy=ONE_READER)


def no_kernel(
    operator: str, target: object, reason: str, culprit: ir.Node | ir.Value, *, instead: str = ""
) -> Declined:
    """Returns the decline of a rewrite whose result the target cannot run.

    Args:
        operator: what it would become.
        target: what it is for.
        reason: what the target says; what that brings helps first.
        culprit: the node or value at fault.
        instead: what else gives small weights there.
    """
    helps = reason_of(reason).remedy or OTHER_TARGET
    return Declined(
        f"{operator} on target {target}: {reason}", culprit, remedy=f"{helps}{instead and f', or {instead}'}"
    )


ONE_SPEC = "give all experts of a layer one spec: overrides by role and layer"
UNSTACK = "run rule unstack in an earlier phase (extends: unstack)"
RELABEL = "give fc1 the dims [E, I, H] and fc2 [E, H, I]: runtimes read the same memory so"
FROM_FLOAT = "start from the float model, or run rule qmoe-to-moe before"
ONE_READER = "give the other reader a copy of its own, or remove it"
NOT_AN_OUTPUT = "take it off the graph's outputs"
NOT_AN_INPUT = "take it off the graph's inputs (export with keep_initializers_as_inputs=False)"
FOLDED = "fold constants before: onnxscript.optimizer.optimize, or the exporter's own optimization"
NOT_WHOLE = "remove what reads the whole stack, or leave it stacked and fuse the block"
OTHER_BLOCK_SIZE = "choose a block size that divides it: --set quantization.default.block_size=32"
OTHER_BITS = "choose a width that runs: --set quantization.default.bits=4"
GLU_ON_CUDA = "CUDA has it from ONNX Runtime 1.32 on: export in float16 and rewrite for --target cuda:sm80@1.32"
HALVES = "export in float16, which every kernel runs"
ONE_FLOAT_TYPE = "export in one float type: float32 or float16"
NAME_ARCHITECTURE = "name it: --target cuda:sm80 or cuda:sm90"
MIN_BYTES = "lower the rule's option min_bytes"
OTHER_TARGET = "rewrite for another --target"
ROUNDED = "accept them: --set rounded_activations=true"
BY_EXPERT = "quantize the experts one by one, by experts-int4, which needs MatMulNBits alone"
UNROLLED = "export the experts unrolled, and each matrix becomes a MatMulNBits"
NO_LOOP = "export with the experts unrolled or batched, with no loop over those that the example input hit"
MERGED = "merge the adapters into the weights before the export (peft: merge_and_unload)"
WHOLE_BLOCK = "export the block whole: each expert once, under one router"
OTHER_FUNCTION = "the operator computes something else: quantize the experts one by one (experts-int4)"
OTHER_WEIGHTS = "the operator weighs experts otherwise: quantize them one by one (experts-int4)"
FIXED_COUNT = "export with a fixed number of experts for each token"
INFER_SHAPES = "export with types and shapes (value_info): what ONNX infers of the others does not tell it"
CONSTANT = (
    "make it constant (static expert indices, folded constants); experts that are chosen at run time can only be fused"
    " whole, by rule fuse-experts"
)
INLINE = "inline the function: onnx.inliner.inline_local_functions(model)"
ONE_OPSET = "export without functions, or functions and model at one opset"
ON_THE_RIGHT = "write the product as x @ w, with the weight on the right"
ONE_MATRIX = "a batched product stays as it is, unless its block is fused (rule fuse-experts)"
OTHER_RULES_WEIGHTS = "nothing: the rule is about other weights"
PLAIN_MATMUL = "fold it into the weight, or write a plain MatMul"
"""Remedies that several rules give: what a user would have to change."""
