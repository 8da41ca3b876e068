"""What the rules about MoE nodes share: reading one with constant expert weights, and writing one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from rewriter.emit import write_integers, write_operator
from rewriter.facts import Facts
from rewriter.graph.declines import ONE_FLOAT_TYPE, RELABEL, UNSTACK, WHOLE_BLOCK, no_kernel, stays_float
from rewriter.operators.form import ExpertForm, form_of
from rewriter.operators.moe import MOE
from rewriter.operators.operator import input_at
from rewriter.operators.qmoe import QMOE
from rewriter.rule import Declined, Run
from rewriter.rules.blocks.guards import require_constant, require_float
from rewriter.rules.blocks.readers import is_whole, origin, require_one_reader
from rewriter.tensors import StackedCopy, View, ViewTensor


@dataclass(frozen=True)
class Projection:
    """One of an MoE's linear maps.

    Attributes:
        name: fc1, fc2 or fc3.
        value: the weights in the graph.
        weight: what they are: [E, N, K].
        bias: [E, N], or None.
    """

    name: str
    value: ir.Value
    weight: View
    bias: ir.Value | None


@dataclass(frozen=True)
class Experts:
    """An MoE node whose expert weights are constants.

    Attributes:
        node: the node.
        form: what it computes.
        x: [T, H] or [B, S, H].
        router: [T, E] logits.
        dtype: of x and of the weights.
        projections: fc1 [E, F * I, H], fc2 [E, H, I] and, where it is gated, fc3 [E, I, H].
    """

    node: ir.Node
    form: ExpertForm
    x: ir.Value
    router: ir.Value
    dtype: ir.DataType
    projections: tuple[Projection, ...]


def read_moe(run: Run, node: ir.Node) -> Experts:
    """Reads an MoE, or declines: its weights are not constant, or do not belong together."""
    form = form_of(node)
    if form.unknown:
        unknown = ", ".join(form.unknown)
        raise Declined(f"it has attributes that MoE does not have, or that a caller sets: {unknown}", node)
    x, router = _required(node, 0, "input"), _required(node, 1, "router_probs")
    dtype = element_type(node)
    found = []
    for slots in MOE.projections:
        value = input_at(node, slots.weight)
        if value is None and slots is MOE.projections[2]:
            continue
        value = _required(node, slots.weight, f"{slots.name} weights")
        weight = require_constant(run.facts, value, slots.name)
        if weight.dtype != dtype:
            raise Declined(
                f"{slots.name} is {weight.dtype.name} and the input {dtype.name}", value, remedy=ONE_FLOAT_TYPE
            )
        found.append(Projection(slots.name, value, weight, input_at(node, slots.bias)))
    experts = Experts(node, form, x, router, dtype, tuple(found))
    _require_shapes(experts)
    return experts


def element_type(node: ir.Node) -> ir.DataType:
    """Returns the element type of x, or declines; every input of an MoE has it, so that the weights tell it too."""
    x, fc2 = _required(node, 0, "input"), _required(node, MOE.projections[1].weight, "fc2 weights")
    return require_float(fc2 if x.dtype is None else x)


def require_weights_disappear(facts: Facts, experts: Experts, *, rearranged: bool = False) -> None:
    """Declines where a new weight would stand in the model beside the old one, or float ones would be stored wider."""
    for projection in experts.projections:
        value = projection.value
        if not is_whole(facts, value):
            reason = f"{projection.name} is part of a constant that stays in the model (rule unstack takes it out)"
            raise Declined(reason, value.producer(), remedy=UNSTACK)
        if value is not origin(facts, value):
            stored = projection.weight.unwidened.dtype
            if rearranged and stored != experts.dtype:
                reason = f"{projection.name} is stored in {stored.name} and cast to {experts.dtype.name}"
                raise Declined(f"{reason}: rearranged, it would be stored wide", value, remedy=ONE_FLOAT_TYPE)
            require_one_reader(facts, value, experts.node)
            continue
        for use in value.uses():
            if not MOE.computes(use.node) or use.idx not in [slots.weight for slots in MOE.projections]:
                raise stays_float(use.node, f"the float weight {projection.name}")
        if value.is_graph_output():
            raise stays_float(value, f"the float weight {projection.name}")


def constant_bias(run: Run, projection: Projection) -> View | None:
    """Returns the view that a bias is, None where there is none, or declines: it is not constant."""
    return None if projection.bias is None else require_constant(run.facts, projection.bias, f"{projection.name}_bias")


def interleaved(first: View, second: View) -> ViewTensor:
    """Returns [E, 2 * I, ..]: the rows of two [E, I, ..] in turn."""
    both = View.whole(StackedCopy((first, second), 2, f"{first.name}__interleaved"), f"{first.name}__interleaved")
    return ViewTensor(both.reshape((first.shape[0], 2 * first.shape[1], *first.shape[2:])))


def flat_router(op: Any, router: ir.Value, experts: int) -> ir.Value:
    """Returns the logits as [T, E]: runtimes refuse [B, S, E], which some exporters write."""
    if router.shape is None or router.shape.rank() != 3:
        return router
    flat: ir.Value = op.Reshape(router, write_integers(op, [-1, experts], "router_shape"))
    return flat


def emit_moe(run: Run, op: Any, experts: Experts, form: ExpertForm, weights: Sequence[ir.Value | None]) -> Any:
    """Writes an MoE, or declines: the target computes it wrongly, where it refuses the present one loudly.

    One that QMoE alone computes is written, for rule moe-to-qmoe.

    Args:
        run: the present run.
        op: onnxscript's builder.
        experts: gives x and the router.
        form: what the new node computes.
        weights: fc1, fc1_bias, fc2, fc2_bias and perhaps fc3, fc3_bias.
    """
    dtype = experts.dtype.name
    reason = run.target.runs(MOE.name, form, dtype)
    others = (run.target.runs(QMOE.name, form, dtype, weighted=weighted) for weighted in (False, True))
    if isinstance(reason, str) and all(isinstance(other, str) for other in others):
        raise no_kernel(MOE.name, run.target, reason, experts.node)
    router = flat_router(op, experts.router, experts.projections[0].weight.shape[0])
    return write_operator(op, MOE, [experts.x, router, *weights], form.attributes())


def _required(node: ir.Node, slot: int, what: str) -> ir.Value:
    value = input_at(node, slot)
    if value is None:
        raise Declined(f"required input {slot} ({what}) is missing", node, remedy=WHOLE_BLOCK)
    return value


def _require_shapes(experts: Experts) -> None:
    """Holds every weight and bias to E, H and I, as fc2 [E, H, I] has them."""
    fc2 = experts.projections[1].weight
    if fc2.rank != 3 or 0 in fc2.shape:
        raise Declined(f"fc2 has shape {list(fc2.shape)}; expected [E, H, I]", experts.node)
    e, h, i = fc2.shape
    features = None if experts.x.shape is None else experts.x.shape[-1]
    if isinstance(features, int) and features != h:
        reason = f"fc2 has shape {list(fc2.shape)} and the input {features} features: expected [E, {features}, I]"
        raise Declined(reason, experts.node, remedy=RELABEL)
    form = experts.form
    if form.glu and not form.fusion and not form.gated:
        raise Declined("swiglu_fusion=0 needs the linear half in fc3", experts.node)
    if form.glu and form.fusion and form.gated:
        raise Declined(f"fc3 beside swiglu_fusion={form.fusion}, which holds it in fc1", experts.node)
    expected = {"fc1": (e, form.fused * i, h), "fc2": (e, h, i), "fc3": (e, i, h)}
    for projection in experts.projections:
        shape = expected[projection.name]
        if projection.weight.shape != shape:
            found = list(projection.weight.shape)
            raise Declined(f"{projection.name} has shape {found}; expected {list(shape)}", projection.value)
        bias = projection.bias
        if bias is not None and bias.shape is not None and bias.shape.is_static() and bias.shape.numpy() != shape[:2]:
            raise Declined(f"{projection.name}_bias has shape {bias.shape}; expected {list(shape[:2])}", bias)
    if not 1 <= form.k <= e:
        raise Declined(f"k = {form.k} of {e} experts", experts.node)
