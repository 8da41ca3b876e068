"""What operators require: arity and attribute types from schemas, rank, shape and dtype of constant operands."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx
import onnx_ir as ir

from rewriter.operators.gather_block_quantized import GATHER_BLOCK_QUANTIZED
from rewriter.operators.matmul_nbits import MATMUL_NBITS
from rewriter.operators.moe import MOE
from rewriter.operators.operator import DOMAIN, ExpertsOperator
from rewriter.operators.qmoe import QMOE, quantized_of

Shape = tuple[int, ...]

_PACKED = (ir.DataType.UINT8, ir.DataType.INT8, ir.DataType.UINT4, ir.DataType.INT4)
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


@dataclass(frozen=True)
class Signature:
    """Inputs and attributes of an operator.

    Attributes:
        names: of the declared inputs.
        required: indexes that may not be left out.
        most: largest number of inputs.
        attributes: type of each; empty where they are not known.
    """

    names: tuple[str, ...]
    required: tuple[int, ...]
    most: int
    attributes: Mapping[str, ir.AttributeType] = field(default_factory=dict)


def _contrib(marked: Sequence[str]) -> Signature:
    """Reads ``a``, ``b``, ``c?``: the leading inputs, optional where marked; others may follow."""
    return Signature(
        tuple(name.rstrip("?") for name in marked),
        tuple(i for i, name in enumerate(marked) if not name.endswith("?")),
        1 << 30,  # later releases append optional inputs
    )


_CONTRIB = {
    **{o.name: _contrib(o.inputs) for o in (MOE, QMOE, MATMUL_NBITS, GATHER_BLOCK_QUANTIZED)},
    "RotaryEmbedding": _contrib(["input", "position_ids", "cos_cache", "sin_cache"]),
    "SkipSimplifiedLayerNormalization": _contrib(["input", "skip", "gamma", "bias?"]),
    "SkipLayerNormalization": _contrib(["input", "skip", "gamma", "beta?", "bias?"]),
}


@functools.cache
def signature(domain: str, op_type: str, version: int | None) -> Signature | None:
    """Returns the signature of a standard operator, or of a contrib operator known here; None for any other.

    Args:
        domain: empty for the standard operators.
        op_type: operator.
        version: opset version that the model imports for the domain.
    """
    if domain == DOMAIN:
        return _CONTRIB.get(op_type)
    if version is None:
        return None
    try:
        schema = onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        return None
    single = onnx.defs.OpSchema.FormalParameterOption.Single
    return Signature(
        tuple(p.name for p in schema.inputs),
        tuple(i for i, p in enumerate(schema.inputs) if p.option == single),
        schema.max_input,
        {name: _attribute_type(attribute.type) for name, attribute in schema.attributes.items()},
    )


def _attribute_type(declared: onnx.defs.OpSchema.AttrType) -> ir.AttributeType:
    """Converts ONNX's enumeration of attribute types to onnx-ir's, by name: its type stubs show no more."""
    return ir.AttributeType[str(declared).rpartition(".")[2]]


OperandCheck = Callable[[ir.Node], str | None]
"""Returns what is impossible about a node's operands whose shape is certain, or None.

Shapes declared for intermediate values are often stale, and runtimes ignore them: only initializers are judged.
"""


def operand_check(domain: str, op_type: str) -> OperandCheck | None:
    """Returns the check of an operator's operands, or None where there is none."""
    return _CHECKS.get((domain, op_type))


def _constant(node: ir.Node, index: int) -> tuple[Shape, ir.DataType, str] | None:
    """Shape, dtype and name of an initializer operand."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None or not value.is_initializer() or value.is_graph_input() or value.const_value is None:
        return None
    tensor = value.const_value
    return tuple(int(d) for d in tensor.shape.numpy()), tensor.dtype, value.name or ""


def _matmul(node: ir.Node) -> str | None:
    left, right = _constant(node, 0), _constant(node, 1)
    for index, operand in enumerate((left, right)):
        if operand and not operand[0]:
            return f"input {index} ('{operand[2]}') is a scalar, which MatMul does not take"
    if left and right and left[0][-1] != right[0][max(len(right[0]) - 2, 0)]:
        return f"{list(left[0])} ('{left[2]}') cannot be multiplied with {list(right[0])} ('{right[2]}')"
    return None


def _gemm(node: ir.Node) -> str | None:
    for index in (0, 1):
        operand = _constant(node, index)
        if operand and len(operand[0]) != 2:
            return f"input {index} ('{operand[2]}') has rank {len(operand[0])}, and Gemm takes rank 2"
    return None


def _ranks(node: ir.Node, wanted: Mapping[int, tuple[str, tuple[int, ...]]]) -> str | None:
    for index, (name, ranks) in wanted.items():
        operand = _constant(node, index)
        if operand and len(operand[0]) not in ranks:
            expected = " or ".join(map(str, ranks))
            return f"input {index} ({name}) holds '{operand[2]}' of shape {list(operand[0])}; expected rank {expected}"
    return None


def _experts(node: ir.Node, weights: dict[int, str]) -> str | None:
    counts = {name: operand[0][0] for i, name in weights.items() if (operand := _constant(node, i)) and operand[0]}
    if len(set(counts.values())) > 1:
        return "its inputs disagree on the number of experts: " + ", ".join(f"{n} {e}" for n, e in counts.items())
    return None


def _named(operator: ExpertsOperator, part: str) -> dict[int, str]:
    """The input slots of a part of fc1, fc2 and fc3, each with the name that the schema gives it."""
    slots = [getattr(projection, part) for projection in operator.projections]
    return {slot: operator.inputs[slot].rstrip("?") for slot in slots}


_MOE_WEIGHTS, _MOE_BIASES = (_named(MOE, part) for part in ("weight", "bias"))
_QMOE_WEIGHTS, _QMOE_BIASES = (_named(QMOE, part) for part in ("weight", "bias"))
_QMOE_SCALES, _QMOE_ZERO_POINTS = (_named(QMOE, part) for part in ("scales", "zero_points"))


def _limit(node: ir.Node) -> str | None:
    attribute = node.attributes.get("swiglu_limit")
    if attribute is None or attribute.is_ref() or not attribute.as_float() < 0:
        return None
    return f"swiglu_limit is {attribute.as_float():g}; a negative limit makes ONNX Runtime abort the process"


def _moe(node: ir.Node) -> str | None:
    ranks = _each(_MOE_WEIGHTS, 3) | _each(_MOE_BIASES, 2)
    return _limit(node) or _ranks(node, ranks) or _experts(node, _MOE_WEIGHTS | _MOE_BIASES)


def _qmoe(node: ir.Node) -> str | None:
    ranks = _each(_QMOE_WEIGHTS, 3) | _each(_QMOE_SCALES, 2, 3) | _each(_QMOE_BIASES, 2)
    for index, name in _QMOE_WEIGHTS.items():
        operand = _constant(node, index)
        if operand and operand[1] in _FLOATS:
            return f"input {index} ({name}) holds '{operand[2]}' of dtype {operand[1].name}; expected packed integers"
    wrong = _limit(node) or _ranks(node, ranks) or _experts(node, _QMOE_WEIGHTS | _QMOE_SCALES | _QMOE_BIASES)
    return wrong or _unscaled(node)


def _unscaled(node: ir.Node) -> str | None:
    """Returns what would crash ONNX Runtime: codes without scales, and more zero points than codes."""
    if ((given := node.attributes.get("quant_type")) and given.is_ref()) or quantized_of(node).quant_type != "int":
        return None
    for weight, scales, zero_points in zip(_QMOE_WEIGHTS, _QMOE_SCALES, _QMOE_ZERO_POINTS, strict=True):
        present = [index < len(node.inputs) and node.inputs[index] is not None for index in (weight, scales)]
        if present == [True, False]:
            return f"input {scales} ({_QMOE_SCALES[scales]}) is missing"
        codes, zeros = _constant(node, weight), _constant(node, zero_points)
        if codes and zeros and math.prod(zeros[0]) > math.prod(codes[0]):
            name, shape = _QMOE_ZERO_POINTS[zero_points], list(zeros[0])
            return f"input {zero_points} ({name}) holds '{zeros[2]}' of shape {shape}; the codes are {list(codes[0])}"
    return None


def _each(inputs: Mapping[int, str], *ranks: int) -> dict[int, tuple[str, tuple[int, ...]]]:
    return {index: (name, ranks) for index, name in inputs.items()}


def _matmul_nbits(node: ir.Node) -> str | None:
    sizes: dict[str, int] = {"bits": 4}
    for name in ("K", "N", "bits", "block_size"):
        attribute = node.attributes.get(name)
        if attribute is not None and attribute.is_ref():
            return None
        if attribute is not None:
            sizes[name] = attribute.as_int()
        elif name not in sizes:
            return f"required attribute {name} is missing"
    if min(sizes.values()) < 1:
        return f"attributes K, N, bits and block_size must be positive: {sizes}"
    blocks = -(-sizes["K"] // sizes["block_size"])
    blob = -(-sizes["block_size"] * sizes["bits"] // 8)
    codes = _constant(node, 1)
    if codes and codes[1] not in _PACKED:
        return f"input 1 (B) holds '{codes[2]}' of dtype {codes[1].name}; expected UINT8"
    for index, name, count in ((1, "B", sizes["N"] * blocks * blob), (2, "scales", sizes["N"] * blocks)):
        operand = _constant(node, index)
        if operand and math.prod(operand[0]) != count:
            given = ", ".join(f"{key}={value}" for key, value in sizes.items())
            return (
                f"input {index} ({name}) holds '{operand[2]}' of shape {list(operand[0])};"
                f" {given} need {count:,} elements"
            )
    return None


def _gather_block_quantized(node: ir.Node) -> str | None:
    data, scales = _constant(node, 0), _constant(node, 2)
    if data and data[1] not in _PACKED:
        return f"input 0 (data) holds '{data[2]}' of dtype {data[1].name}; expected 4-bit or 8-bit integers"
    if data and scales and len(data[0]) != len(scales[0]):
        return f"data '{data[2]}' has rank {len(data[0])} and scales '{scales[2]}' rank {len(scales[0])}"
    return None


_CHECKS: dict[tuple[str, str], OperandCheck] = {
    ("", "MatMul"): _matmul,
    ("", "Gemm"): _gemm,
    (DOMAIN, MOE.name): _moe,
    (DOMAIN, QMOE.name): _qmoe,
    (DOMAIN, MATMUL_NBITS.name): _matmul_nbits,
    (DOMAIN, GATHER_BLOCK_QUANTIZED.name): _gather_block_quantized,
}
