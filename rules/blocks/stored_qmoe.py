"""What the rules that read a QMoE share: which layout its weights are in, and its experts one at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.errors import QuantizationError
from rewriter.operators.form import ExpertForm, form_of
from rewriter.operators.layout.stored import Layout, Stored
from rewriter.operators.operator import input_at
from rewriter.operators.qmoe import (
    LAYOUT_KEY,
    LAYOUTS,
    QMOE,
    RAW,
    ROUTER_WEIGHTS,
    LayoutName,
    Quantized,
    layout_named,
    quantized_of,
)
from rewriter.quantize.formats import FORMATS, INT
from rewriter.quantize.types import QuantizedShape, QuantizedWeight
from rewriter.rule import Declined, Run
from rewriter.rules.blocks.guards import require_constant
from rewriter.tensors import RowsTensor, View


@dataclass(frozen=True)
class StoredProjection:
    """One quantized linear map of all experts.

    Attributes:
        name: fc1, fc2 or fc3.
        codes: [E, ...] uint8.
        scales: [E, N] or [E, N, K / block].
        zero_points: packed, or None.
        global_scale: [E] of mxfp4 and nvfp4, or None.
        bias: [E, N], or None.
        shape: of one expert's weight.
    """

    name: str
    codes: View
    scales: View
    zero_points: View | None
    global_scale: View | None
    bias: ir.Value | None
    shape: QuantizedShape

    @property
    def arrays(self) -> list[View]:
        """Codes, scales and, where there are any, zero points or the global scale."""
        found = (self.codes, self.scales, self.zero_points, self.global_scale)
        return [view for view in found if view is not None]

    def expert(self, index: int, layout: Layout) -> QuantizedWeight:
        """Reads one expert back from its bytes."""
        return layout.require(self.shape).unpack([view.index(0, index).numpy() for view in self.arrays])


@dataclass(frozen=True)
class StoredExperts:
    """A QMoE whose weights are constants.

    Attributes:
        node: the node.
        form: what it computes.
        held: bits, block and layout attributes.
        router_weights: [T, E], or None.
        projections: fc1, fc2 and perhaps fc3.
        layout: of the weights.
    """

    node: ir.Node
    form: ExpertForm
    held: Quantized
    router_weights: ir.Value | None
    projections: tuple[StoredProjection, ...]
    layout: Layout


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
        views = projection.arrays
        super().__init__(
            lambda first, count: np.stack([make(first + index) for index in range(count)]),
            dtype,
            shape,
            f"{projection.codes.name}_{suffix}",
            views,
        )
        self.key = (what, dtype, shape, projection.shape.bits, *views)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ExpertRows) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def dtype_name(node: ir.Node) -> str:
    """Returns the element type of x, which is float32 where the model does not say."""
    x = node.inputs[0]
    return "FLOAT" if x is None or x.dtype is None else x.dtype.name


def read_qmoe(run: Run, node: ir.Node, unmarked: LayoutName | None) -> StoredExperts:
    """Reads a QMoE, or declines.

    Args:
        run: the present run.
        node: it.
        unmarked: layout of a node of which neither metadata, attribute nor shapes tell it; None declines there.
    """
    form, held = form_of(node), quantized_of(node)
    if form.unknown:
        raise Declined(f"it has attributes that QMoE does not have: {', '.join(form.unknown)}", node)
    own = held.format
    used = [slots.global_scale for slots in QMOE.projections] if own is not None and FORMATS[own].global_scale else []
    more = [slot for slot, value in enumerate(node.inputs) if slot > ROUTER_WEIGHTS and value is not None]
    if own is None or not set(more) <= set(used):
        raise Declined(f"quant_type '{held.quant_type}', or scales of activations, are not read", node)
    fc1, fc2, _ = QMOE.projections
    scales = [_constant(run, node, slot, "scales") for slot in (fc1.scales, fc2.scales)]
    hidden, inter = scales[1].shape[1], scales[0].shape[1] // form.fused
    sizes = {"fc1": (form.fused * inter, hidden), "fc2": (hidden, inter), "fc3": (inter, hidden)}
    found = []
    for slots, bits, symmetric in zip(QMOE.projections, held.bits, (not z for z in held.zero_points), strict=True):
        name = slots.name
        if input_at(node, slots.weight) is None:
            continue
        found.append(
            StoredProjection(
                name,
                _constant(run, node, slots.weight, f"{name} codes"),
                _constant(run, node, slots.scales, f"{name} scales"),
                None if symmetric else _constant(run, node, slots.zero_points, f"{name} zero points"),
                _constant(run, node, slots.global_scale, f"{name} global scale", rank=1) if used else None,
                input_at(node, slots.bias),
                QuantizedShape(*sizes[name], bits, FORMATS[own].block or held.block, symmetric, own),
            )
        )
    projections = tuple(found)
    layout = _layout(node, held, projections, unmarked)
    return StoredExperts(node, form, held, input_at(node, ROUTER_WEIGHTS), projections, layout)


def _constant(run: Run, node: ir.Node, slot: int | None, what: str, rank: int = 2) -> View:
    value = input_at(node, slot)
    if value is None:
        raise Declined(f"{what} are missing", node)
    view = require_constant(run.facts, value, what)
    if view.rank < rank:
        raise Declined(f"{what} have shape {list(view.shape)}; expected [E, ...]", value)
    return view


def _layout(
    node: ir.Node, held: Quantized, projections: tuple[StoredProjection, ...], unmarked: LayoutName | None
) -> Layout:
    """Returns the layout that metadata, attribute or shapes tell, in this order; then what ``unmarked`` says."""
    stamp = node.metadata_props.get(LAYOUT_KEY)
    if stamp is not None:
        try:
            return layout_named(stamp)
        except QuantizationError as error:
            raise Declined(str(error), node) from error
    fits = [layout for layout in LAYOUTS if all(p.codes.shape[1:] == layout.order.shape(p.shape) for p in projections)]
    if not fits:
        shapes = ", ".join(f"{p.name} {list(p.codes.shape)}" for p in projections)
        raise Declined(f"the shapes of its codes ({shapes}) fit no layout", node)
    if held.format != INT.name:
        possible = [layout for layout in fits if all(isinstance(layout.of(p.shape), Stored) for p in projections)]
        if unmarked is None and len(possible) != 1:
            reason = (
                "neither metadata nor shapes tell the layout of its float codes; name it with the option 'unmarked'"
            )
            raise Declined(reason, node)
        return possible[0] if len(possible) == 1 else layout_named(unmarked or RAW.name)
    if held.prepacked == 0 or (held.prepacked == -1 and fits == [RAW]):
        return RAW
    if unmarked is None or (unmarked == "raw" and held.prepacked == 1):
        reason = "neither metadata, weights_prepacked nor shapes tell its layout; name it with the option 'unmarked'"
        raise Declined(reason, node)
    return layout_named(unmarked)
