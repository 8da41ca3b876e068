"""What else an attribute may say: other values that the operator's specification allows.

Source: the schemas of ONNX, and of ONNX Runtime for com.microsoft. ONNX Runtime does not check all of the latter, and
what they exclude may end the process: such a value is never given.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping

import onnx
import onnx_ir as ir

from rewriter.operators.activation import ACTIVATIONS
from rewriter.operators.form import OPERATORS as EXPERTS
from rewriter.operators.gather_block_quantized import GATHER_BLOCK_QUANTIZED
from rewriter.operators.matmul_nbits import MATMUL_NBITS

Plain = int | float | str | tuple[int, ...] | tuple[float, ...]

_BITS = (2, 4, 8)
_BLOCKS = (16, 32, 64, 128)
_NAMED: Mapping[str, tuple[Plain, ...]] = {
    "accuracy_level": (0, 1, 4),
    "activation_type": tuple(activation.name for activation in ACTIVATIONS),
    "approximate": ("none", "tanh"),
    "bits": _BITS,
    "block_size": _BLOCKS,
    "expert_weight_bits": _BITS,
    "fc1_expert_weight_bits": _BITS,
    "fc2_expert_weight_bits": _BITS,
    "reduction": ("none", "add", "mul", "max", "min"),
    "swiglu_fusion": (0, 1, 2),
    "swiglu_limit": (0.5, 7.0, math.inf),
    "to": tuple(t.value for t in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT64, ir.DataType.INT32)),
}
_FLAGS = frozenset(("allowzero", "exclusive", "fmod", "keepdims", "largest", "noop_with_empty_axes"))
_FLAGS |= {"normalize_routing_weights", "reverse", "saturate", "sorted", "transA", "transB", "use_sparse_mixer"}
_COUNTS = frozenset(("K", "N", "k"))
_SIGNED = frozenset(("gather_axis", "quantize_axis"))
_CONTRIB = {operator.name: operator for operator in (*EXPERTS, MATMUL_NBITS, GATHER_BLOCK_QUANTIZED)}


def others(node: ir.Node, name: str, value: Plain) -> Iterator[Plain]:
    """Yields other legal values of an attribute, where any are known."""
    if name in _FLAGS:
        yield 1 - int(value)  # type: ignore[arg-type]
    elif name in _NAMED:
        yield from (other for other in _NAMED[name] if other != value)
    elif name == "equation" and isinstance(value, str):
        yield from _equations(value)
    elif isinstance(value, int):
        if name in _COUNTS or name in _SIGNED or node.domain == "":
            yield from (other for other in (value + 1, value - 1) if other > 0 or name not in _COUNTS)
    elif isinstance(value, float):
        yield from (2 * value + 1, value / 2 if value else -1.0) if math.isfinite(value) else (1.0,)
    elif isinstance(value, tuple):
        yield from swapped_neighbours(value)
        for i, element in enumerate(value):
            yield (*value[:i], element + 1, *value[i + 1 :])


def swapped_neighbours(elements: tuple[float, ...]) -> Iterator[tuple[float, ...]]:
    """Yields a sequence with two unequal neighbours swapped, for each such pair."""
    for i, (first, second) in enumerate(itertools.pairwise(elements)):
        if first != second:
            yield (*elements[:i], second, first, *elements[i + 2 :])


def defaults(node: ir.Node, version: int) -> Mapping[str, Plain]:
    """Returns the attributes that a node lacks and may have, with what they default to."""
    known: Mapping[str, Plain | None]
    if node.domain == "com.microsoft":
        known = _CONTRIB[node.op_type].attributes if node.op_type in _CONTRIB else {}
    else:
        schema = _schema(node, version)
        held = {} if schema is None else {n: a.default_value for n, a in schema.attributes.items()}
        known = {n: _plain(onnx.helper.get_attribute_value(proto)) for n, proto in held.items() if proto.name}
    return {name: value for name, value in known.items() if name not in node.attributes and value is not None}


def is_required(node: ir.Node, name: str, version: int) -> bool:
    """Whether the specification is known to want the attribute."""
    schema = _schema(node, version)
    return schema is not None and name in schema.attributes and schema.attributes[name].required


def is_optional_input(node: ir.Node, index: int, version: int) -> bool:
    """Whether an input may be left out; where no specification is known, all but the first are tried."""
    if node.op_type == "Loop":
        return False  # it might never end
    schema = _schema(node, version)
    if schema is None:
        return index > 0
    formal = schema.inputs[min(index, len(schema.inputs) - 1)]
    return formal.option == onnx.defs.OpSchema.FormalParameterOption.Optional


def plain(attribute: ir.Attr) -> Plain | None:
    """Returns what an attribute says, or None where it holds a graph or a tensor, or is a function's."""
    return None if attribute.is_ref() else _plain(attribute.value)


def _plain(value: object) -> Plain | None:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, int | float | str):
        return value
    if isinstance(value, list | tuple) and all(isinstance(element, int | float) for element in value):
        return tuple(value)
    return None


def _equations(equation: str) -> Iterator[str]:
    """Einsum's equation with the first two letters of one operand swapped."""
    operands, arrow, result = equation.partition("->")
    terms = operands.split(",")
    for i, term in enumerate(terms):
        letters = term.strip()
        if len(letters) > 1 and letters.isalpha():
            turned = letters[1] + letters[0] + letters[2:]
            yield ",".join([*terms[:i], turned, *terms[i + 1 :]]) + arrow + result


def _schema(node: ir.Node, version: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(node.op_type, version, node.domain)
    except onnx.defs.SchemaError:
        return None
