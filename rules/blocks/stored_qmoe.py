"""What the rules that read a QMoE share: which layout its weights are in, and its experts one at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.errors import QuantizationError
from rewriter.operators.form import (
    PROJECTIONS,
    ROUTER_WEIGHTS,
    SLOTS,
    ExpertForm,
    Quantized,
    form_of,
    input_at,
    quantized_of,
)
from rewriter.operators.layout import cutlass, qmoe
from rewriter.operators.layout.packing import packed_width
from rewriter.operators.layout.qmoe import LAYOUT_KEY, QMoEArrays
from rewriter.quantize.types import QuantizedWeight
from rewriter.rule import Declined, Run
from rewriter.rules.blocks.guards import require_constant
from rewriter.tensors import RowsTensor, View

LayoutName = Literal["raw", "cutlass-sm80", "cutlass-sm90"]


@dataclass(frozen=True)
class StoredProjection:
    """One quantized linear map of all experts.

    Attributes:
        name: fc1, fc2 or fc3.
        codes: [E, ...] uint8.
        scales: [E, N] or [E, N, K / block].
        zero_points: packed, or None.
        bias: [E, N], or None.
        n: output features.
        k: input features.
        bits: width of a code.
        block: input features per scale; 0 is the whole row.
    """

    name: str
    codes: View
    scales: View
    zero_points: View | None
    bias: ir.Value | None
    n: int
    k: int
    bits: int
    block: int

    def expert(self, index: int, prepacked: int | None) -> QuantizedWeight:
        """Reads one expert back from its bytes."""
        zeros = None if self.zero_points is None else self.zero_points.index(0, index).numpy()
        arrays = QMoEArrays(self.codes.index(0, index).numpy(), self.scales.index(0, index).numpy(), zeros)
        return qmoe.unpack(arrays, self.n, self.k, self.bits, self.block, prepacked=prepacked)


@dataclass(frozen=True)
class StoredExperts:
    """A QMoE whose weights are constants.

    Attributes:
        node: the node.
        form: what it computes.
        held: bits, block and layout attributes.
        router_weights: [T, E], or None.
        projections: fc1, fc2 and perhaps fc3.
        prepacked: None for raw weights, else the architecture of their CUTLASS layout.
    """

    node: ir.Node
    form: ExpertForm
    held: Quantized
    router_weights: ir.Value | None
    projections: tuple[StoredProjection, ...]
    prepacked: int | None


class ExpertRows(RowsTensor):
    """A stack [E, ...] made of stored experts, one at a time.

    Attributes:
        key: equal for equal tensors, so that the commit can share them.
    """

    def __init__(
        self,
        projection: StoredProjection,
        make: Callable[[int], npt.NDArray[Any]],
        dtype: ir.DataType,
        shape: tuple[int, ...],
        what: str,
        suffix: str,
    ) -> None:
        views = [v for v in (projection.codes, projection.scales, projection.zero_points) if v is not None]
        super().__init__(
            lambda first, count: np.stack([make(first + index) for index in range(count)]),
            dtype,
            shape,
            f"{projection.codes.name}_{suffix}",
            views,
        )
        self.key = (what, dtype, shape, projection.bits, *views)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ExpertRows) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def read_qmoe(run: Run, y: ir.Value, unmarked: LayoutName | None) -> StoredExperts:
    """Reads the QMoE that computes ``y``, or declines.

    Args:
        run: the present run.
        y: its output.
        unmarked: layout of a node of which neither metadata, attribute nor shapes tell it; None declines there.
    """
    node = y.producer()
    assert node is not None
    form, held = form_of(node), quantized_of(node)
    if form.unknown:
        raise Declined(f"it has attributes that QMoE does not have: {', '.join(form.unknown)}", node)
    if held.quant_type != "int" or any(v is not None for v in node.inputs[ROUTER_WEIGHTS + 1 :]):
        raise Declined(f"quant_type '{held.quant_type}' or global scales; only plain integers are read", node)
    scales = [_constant(run, node, slot, "scales") for slot in SLOTS["QMoE"]["scales"][:2]]
    hidden, inter = scales[1].shape[1], scales[0].shape[1] // form.fused
    sizes = {"fc1": (form.fused * inter, hidden), "fc2": (hidden, inter), "fc3": (inter, hidden)}
    found = []
    for index, name in enumerate(PROJECTIONS):
        weight, scale, bias, zeros = (slots[index] for slots in SLOTS["QMoE"].values())
        if input_at(node, weight) is None:
            continue
        zero_points = None if input_at(node, zeros) is None else _constant(run, node, zeros, f"{name} zero points")
        found.append(
            StoredProjection(
                name,
                _constant(run, node, weight, f"{name} codes"),
                _constant(run, node, scale, f"{name} scales"),
                zero_points,
                input_at(node, bias),
                *sizes[name],
                held.bits[index],
                held.block,
            )
        )
    projections = tuple(found)
    prepacked = _layout(node, held, projections, unmarked)
    return StoredExperts(node, form, held, input_at(node, ROUTER_WEIGHTS), projections, prepacked)


def _constant(run: Run, node: ir.Node, slot: int, what: str) -> View:
    value = input_at(node, slot)
    if value is None:
        raise Declined(f"{what} are missing", node)
    view = require_constant(run.facts, value, what)
    if view.rank < 2:
        raise Declined(f"{what} have shape {list(view.shape)}; expected [E, ...]", value)
    return view


def _layout(
    node: ir.Node, held: Quantized, projections: tuple[StoredProjection, ...], unmarked: LayoutName | None
) -> int | None:
    """Returns the layout that metadata, attribute or shapes tell, in this order; then what ``unmarked`` says."""
    stamp = node.metadata_props.get(LAYOUT_KEY)
    if stamp is not None:
        try:
            return qmoe.layout_of(stamp)
        except QuantizationError as error:
            raise Declined(str(error), node) from error
    raw = all(p.codes.shape[1:] == (p.n, packed_width(p.k, p.bits)) for p in projections)
    packed = all(p.codes.shape[1:] == cutlass.shape(p.n, p.k, p.bits) for p in projections)
    if not raw and not packed:
        shapes = ", ".join(f"{p.name} {list(p.codes.shape)}" for p in projections)
        raise Declined(f"the shapes of its codes ({shapes}) fit no layout", node)
    if held.prepacked == 0 or (held.prepacked == -1 and not packed):
        return None
    if unmarked is None or (unmarked == "raw" and held.prepacked == 1):
        reason = "neither metadata, weights_prepacked nor shapes tell its layout; name it with the option 'unmarked'"
        raise Declined(reason, node)
    return qmoe.layout_of(unmarked)
