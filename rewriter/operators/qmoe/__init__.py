"""com.microsoft::QMoE: slots, attributes, stored layouts, and how a node holds its weights.

A projection of E experts is the stack of its experts along a new first axis, so a layout is about one expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from rewriter.errors import QuantizationError, nearest
from rewriter.graph.contents import integer, text
from rewriter.graph.declines import OTHER_BLOCK_SIZE, Reason
from rewriter.operators.layout import blocks
from rewriter.operators.layout.stored import ColumnMajor, Cutlass, Layout, RowMajor, by_name
from rewriter.operators.moe import SHARED_ATTRIBUTES
from rewriter.operators.operator import ExpertsOperator, Slots, input_at
from rewriter.quantize.formats import FORMATS, INT, FormatName
from rewriter.quantize.types import QuantizedShape

QMOE = ExpertsOperator(
    name="QMoE",
    inputs=(
        "input",
        "router_probs",
        *("fc1_experts_weights", "fc1_scales?", "fc1_experts_bias?"),
        *("fc2_experts_weights", "fc2_scales?", "fc2_experts_bias?"),
        *("fc3_experts_weights?", "fc3_scales?", "fc3_experts_bias?"),
        *("fc1_zero_points?", "fc2_zero_points?", "fc3_zero_points?"),
        "router_weights?",
        *("fc1_global_scale?", "fc2_global_scale?"),
        *("fc1_act_scale?", "fc2_act_scale?", "fc1_act_block_scale?", "fc2_act_block_scale?"),
    ),
    attributes={
        **SHARED_ATTRIBUTES,
        "expert_weight_bits": 4,
        "fc1_expert_weight_bits": None,
        "fc2_expert_weight_bits": None,
        "fc3_expert_weight_bits": None,
        "block_size": None,
        "quant_type": "int",
        "weights_prepacked": None,
        "accuracy_level": 0,
    },
    gained={
        "quant_type": (1, 27),
        "weights_prepacked": (1, 28),
        "accuracy_level": (1, 31),
        "fc1_expert_weight_bits": (1, 31),
        "fc2_expert_weight_bits": (1, 31),
        "fc3_expert_weight_bits": (1, 31),
    },
    grown=(((1, 27), 21), ((1, 25), 15), ((1, 24), 14), ((1, 23), 11)),
    quantized=True,
    projections=(
        Slots("fc1", 2, 4, scales=3, zero_points=11, global_scale=15),
        Slots("fc2", 5, 7, scales=6, zero_points=12, global_scale=16),
        Slots("fc3", 8, 10, scales=9, zero_points=13),
    ),
)

ROUTER_WEIGHTS = 14
"""Slot of the weights that mix the experts which router_probs selects."""

QUANT_TYPES: Mapping[FormatName, str] = {"int": "int", "mxfp4": "fp4", "nvfp4": "nvfp4"}
"""Format of codes and scales -> ``quant_type``."""

LAYOUT_KEY = "rewriter.layout"
"""Metadata of a node that names its weights' layout, which neither shapes nor attributes tell."""

LayoutName = Literal["raw", "cutlass-sm80", "cutlass-sm90", "columns"]


def _refuse(shape: QuantizedShape) -> str | None:
    bits, block, k = shape.bits, shape.block, shape.k
    own = FORMATS[shape.format]
    if bits not in own.widths:
        return f"bits is {bits}; QMoE takes 2, 3, 4 or 8" if own is INT else f"bits is {bits}; {own.name} has 4"
    if own.block is not None and (block != own.block or not shape.symmetric):
        return Reason(f"{own.name} has blocks of {own.block}, and no zero points", OTHER_BLOCK_SIZE)
    if reason := blocks.refuse_odd(shape, QMOE.name) or blocks.refuse_partial(shape, QMOE.name):
        return reason
    if k * bits % 8:
        return f"a row of K = {k} codes of {bits} bits does not end on a byte, as QMoE needs"
    return None


def _refuse_floats(shape: QuantizedShape) -> str | None:
    if shape.format != INT.name:
        return f"the CUTLASS layout is of integers, not of {shape.format}"
    return _refuse(shape)


def _refuse_integers(shape: QuantizedShape) -> str | None:
    if shape.format == INT.name:
        return "the layout by columns is of float codes, not of integers"
    return _refuse(shape)


def _per_block(shape: QuantizedShape) -> tuple[int, ...]:
    """[N] where one scale covers the row, whose zero points are packed along N; else [N, K / block]."""
    return (shape.n, shape.blocks) if shape.block else (shape.n,)


_NAMES = ("weight", "scales", "zero_points")
RAW = Layout("raw", "qmoe", RowMajor(), _refuse, _per_block, arrays=_NAMES)
"""Codes [N, K * bits / 8]."""
LAYOUTS = (
    RAW,
    Layout("cutlass-sm80", "qmoe", Cutlass(80), _refuse_floats, _per_block, arrays=_NAMES),
    Layout("cutlass-sm90", "qmoe", Cutlass(90), _refuse_floats, _per_block, arrays=_NAMES),
    Layout("columns", "qmoe", ColumnMajor(), _refuse_integers, _per_block, arrays=_NAMES),
)
"""Layouts of one expert's weight; the codes of all but raw are [K, N * bits / 8]. CUDA reads float codes by columns."""


def weights_prepacked(layout: Layout, format_: FormatName) -> int:
    """Returns the attribute of a node whose weights lie so: float codes by rows are what only the CPU's 1 reads."""
    return int(layout is RAW) if format_ != INT.name else int(layout is not RAW)


def layout_named(name: str) -> Layout:
    """Returns a layout.

    Raises:
        QuantizationError: there is none of this name.
    """
    found = by_name(LAYOUTS, name)
    if found is None:
        raise QuantizationError(f"unknown weight layout '{name}'{nearest(name, [own.name for own in LAYOUTS])}")
    return found


@dataclass(frozen=True)
class Quantized:
    """How a QMoE holds its weights.

    Attributes:
        bits: width of the codes of fc1, fc2 and fc3.
        block: input features per scale; 0 is the whole row.
        zero_points: whether fc1, fc2 and fc3 have zero points.
        prepacked: the attribute ``weights_prepacked``; -1 where it is absent.
        accuracy_level: the attribute; 0 where it is absent.
        quant_type: the attribute; ``int`` where it is absent.
    """

    bits: tuple[int, int, int]
    block: int
    zero_points: tuple[bool, bool, bool]
    prepacked: int
    accuracy_level: int
    quant_type: str

    @property
    def format(self) -> FormatName | None:
        """What ``quant_type`` says of codes and scales; None for what is not known here."""
        return next((name for name, text in QUANT_TYPES.items() if text == self.quant_type), None)


def quantized_of(node: ir.Node) -> Quantized:
    common = integer(node, "expert_weight_bits", 4)
    bits = [integer(node, f"{slots.name}_expert_weight_bits", common) for slots in QMOE.projections]
    zeros = [input_at(node, slots.zero_points) is not None for slots in QMOE.projections]
    return Quantized(
        bits=(bits[0], bits[1], bits[2]),
        block=max(integer(node, "block_size", 0), 0),
        zero_points=(zeros[0], zeros[1], zeros[2]),
        prepacked=integer(node, "weights_prepacked", -1),
        accuracy_level=integer(node, "accuracy_level", 0),
        quant_type=text(node, "quant_type", "int"),
    )
