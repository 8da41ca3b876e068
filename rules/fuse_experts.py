"""A whole MoE block in plain operators -> com.microsoft::MoE.

Equal only but for ties: among equal logits TopK takes the first and ONNX Runtime's kernels the last, and the softmax of
log-sigmoids that a normalised sigmoid becomes tells apart what a saturated sigmoid does not.

Matched:      the Add, ReduceSum, MatMul or Einsum, or the Cast that ends it where halves are summed in float32, that
              completes sum_e share_e(logits) * (down_e @ act(gate_e @ x) * (up_e @ x)), however it is written
Replacement:  MoE(x, logits [T, E], fc1, fc1_bias?, fc2, fc2_bias?), its weights lazy stacks; gate and up rows in turn;
              a factor for each expert goes into its fc2, one for all into a Mul behind. Weights that are no function
              of the logits, as DeepSeek-V3 selects by biased scores and mixes by others: their logarithms, scattered
              where their experts are, are the logits, and their sum is the Mul behind
Declines when:
              an expert is missing, is there twice, reads another x or has another activation
              the activation or the routing is none that MoE has
              the target's MoE does not run it, or not in this dtype
              something else reads a value inside of the block, or its weights; two of gate, up and down are one
              an operator between a router's choice and the sum is none that the recognisers know
              biases of float16 or bfloat16 would have to be scaled, or weights that are not quantized next
Source:       mobius, transformers (eager, batched_mm, grouped_mm) and torch.onnx, as the recognisers list them
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from rewriter.facts import Recogniser
from rewriter.graph.declines import BY_EXPERT, OTHER_TARGET, no_kernel
from rewriter.operators.form import PROJECTIONS, ExpertForm
from rewriter.rule import Declined, NotApplicable, Replacement, Rule
from rewriter.rules.blocks import experts
from rewriter.rules.blocks.block import Block, Routing, normalised, read_block, require_alike, resolve, resolve_given
from rewriter.rules.blocks.contents import Dense, Linear, Packed
from rewriter.rules.blocks.decline_reasons import decline_argmax, decline_unfused
from rewriter.rules.blocks.emit import facts_dtype, form_of, logits_of, logits_of_given, placed, times_total, told
from rewriter.rules.blocks.guards import FLOATS
from rewriter.rules.blocks.matched_nodes import covered
from rewriter.rules.blocks.moe import DOMAIN, Experts, Projection
from rewriter.rules.blocks.qmoe import plan_experts
from rewriter.tensors import View, ViewTensor, interleaved, scaled, stacked

_COMPLETING = ("Add", "ReduceSum", "Cast", "MatMul", "Einsum")


class FuseExperts(Rule):
    """The rule at one operator that completes a block."""

    recognisers: ClassVar[Sequence[Recogniser]] = experts.RECOGNISERS

    def __init__(self, op_type: str, into: Literal["MoE", "QMoE"]) -> None:
        super().__init__(name="fuse-experts")
        self._op_type = op_type
        self._into = into

    def pattern(self, op: Any, a: Any) -> Any:
        return getattr(op, self._op_type)(a, _allow_other_inputs=True, _outputs=["y"])

    def rewrite(self, op: Any, *, a: ir.Value, y: ir.Value) -> Replacement:
        facts = self.run.facts
        block = read_block(facts, y)
        node = y.producer()
        assert node is not None
        if isinstance(block.experts[0].down, Packed):
            raise NotApplicable
        routing = resolve_given(facts, block.mixing) or resolve(block.mixing, node)
        if routing.weights is not None:
            reason = "the router's weights are no softmax and no normalised sigmoid of its logits"
            raise Declined(f"{reason}; only QMoE takes such", node)
        if routing.given is not None:
            _require_logarithms(block, routing.given)
            block = replace(block, mixing=replace(block.mixing, table=None))
        form, routing = self._form(block, routing, facts_dtype(block), node)
        if routing.total is not None:
            block = replace(block, mixing=replace(block.mixing, scale=1.0))
        weights, block = _weights(block, node, rounds=self._into == "QMoE")
        nodes = covered(facts, block, routing)
        if self._into == "QMoE":
            self._require_quantizable(block, form, weights, nodes)
        fed = told(facts, block, routing)
        router = block.mixing.router
        if routing.given is None:
            logits = logits_of(op, facts, routing, weights[0].dtype, router.experts)
        else:
            logits = logits_of_given(op, facts, routing.given, router)
        values = [None if w is None else op.initializer(ViewTensor(w)) for w in weights]
        while values[-1] is None:
            values.pop()

        def moe(x: ir.Value) -> ir.Value:
            out: ir.Value = op.MoE(x, logits, *values, _domain=DOMAIN, **form.attributes())
            return out if routing.total is None else times_total(op, facts, out, x, routing.total, block)

        return Replacement({y: placed(op, facts, block, moe, node)}, nodes, fed)

    def _form(self, block: Block, routing: Routing, dtype: ir.DataType, node: ir.Node) -> tuple[ExpertForm, Routing]:
        form = form_of(block, routing)
        target = self.run.target
        kernel = target.kernel(self._into)
        if kernel is None:
            raise Declined(f"target {target} has no {self._into}", node, remedy=f"{OTHER_TARGET}, or {BY_EXPERT}")
        reason = kernel.refusal(form, dtype.name)
        if reason and self._into == "QMoE" and target.router_weights:
            reason = kernel.refusal(form, dtype.name, weighted=True)
        other = normalised(self.run.facts, block.mixing, routing) if reason else None
        if other is not None and not kernel.refusal(form_of(block, other), dtype.name):
            return form_of(block, other), other
        if reason:
            raise no_kernel(self._into, target, reason, node, instead=BY_EXPERT)
        return form, routing

    def _require_quantizable(self, block: Block, form: ExpertForm, weights: Weights, nodes: Sequence[ir.Node]) -> None:
        """Declines where rule moe-to-qmoe would leave the experts in float, though not all are meant to be."""
        run, target = self.run, self.run.target
        reader = next((n for n in nodes if run.role(n).name.startswith("expert")), nodes[0])
        projections = tuple(
            Projection(name, block.out, weight, None)
            for name, weight in zip(PROJECTIONS, (weights[0], weights[2]), strict=False)
        )
        own = Experts(reader, form, block.x, block.mixing.router.scores.logits, weights[0].dtype, projections)
        held = plan_experts(run, str(self.name), own, smaller_blocks=True)
        for spec in held.specs:
            if target.rounds_activations(spec.bits, held.block):
                where = f"{spec.bits} bits in blocks of {held.block}"
                reason = f"QMoE on target {target} rounds activations to 8 bits at {where}"
                raise Declined(reason, block.out, remedy=f"{OTHER_TARGET}, or {BY_EXPERT}")


class Unfused(Rule):
    """Says at a router's choice why its experts stay apart, where no operator completes a block."""

    recognisers: ClassVar[Sequence[Recogniser]] = experts.RECOGNISERS

    def __init__(self) -> None:
        super().__init__(name="fuse-experts")

    def pattern(self, op: Any, scores: Any, k: Any) -> Any:
        return op.TopK(scores, k, _outputs=["values", "indices"])

    def rewrite(self, op: Any, *, values: ir.Value, indices: ir.Value, scores: ir.Value, k: ir.Value) -> Any:
        decline_unfused(self.run, values, indices)


class UnfusedArgMax(Rule):
    """Says the same where a router chooses otherwise, as Switch, NLLB and Phi-3.5 do."""

    recognisers: ClassVar[Sequence[Recogniser]] = experts.RECOGNISERS

    def __init__(self) -> None:
        super().__init__(name="fuse-experts")

    def pattern(self, op: Any, scores: Any) -> Any:
        return op.ArgMax(scores, _outputs=["indices"])

    def rewrite(self, op: Any, *, scores: ir.Value, indices: ir.Value) -> Any:
        decline_argmax(self.run, scores, indices)


def _require_logarithms(block: Block, given: ir.Value) -> None:
    """Declines where logarithms of the weights that are given would round."""
    dtype = facts_dtype(block)
    if {dtype, given.dtype or dtype} != {ir.DataType.FLOAT}:
        reason = "the router's weights are no softmax of its logits, and logarithms of them would round"
        raise Declined(f"{reason} in {dtype.name}", given)


Weights = tuple[View, View | None, View, View | None]
"""fc1, fc1_bias, fc2 and fc2_bias."""


def _weights(block: Block, node: ir.Node, *, rounds: bool) -> tuple[Weights, Block]:
    """fc1, fc1_bias, fc2 and fc2_bias of the whole block, and the block without the factors that went into them.

    Args:
        block: the block.
        node: what completes it, for the reason.
        rounds: whether factors may round the weights, since they are quantized next.
    """
    gate, gate_bias = _projection([e.gate for e in block.experts], "gate", node)
    down = [_dense(e.down, "down", node) for e in block.experts]
    require_alike(down, "down", node)
    fc2 = stacked(down)
    fc2_bias = (
        stacked([e.bias for e in block.experts if e.bias is not None])
        if require_alike([e.bias for e in block.experts], "bias of down", node)
        else None
    )
    fc1, fc1_bias = gate, gate_bias
    if block.experts[0].up is not None:
        up, up_bias = _projection([e.up for e in block.experts if e.up is not None], "up", node)
        if up.shape != gate.shape or up.dtype != gate.dtype:
            raise Declined(f"up is {list(up.shape)} and gate {list(gate.shape)}", node)
        if len({_elements(view) for view in (gate, up, fc2)}) < 3:
            raise Declined("two of gate, up and down are one weight, which fc1 would hold once more", node)
        fc1 = interleaved(gate, up)
        if gate_bias is not None or up_bias is not None:
            fc1_bias = interleaved(gate_bias or _zeros(gate), up_bias or _zeros(up))
    if fc2.shape[2] != gate.shape[1] or fc2.shape[1] != gate.shape[2]:
        raise Declined(f"down is {list(fc2.shape)} and gate {list(gate.shape)}", node)
    dtypes = {w.dtype for w in (fc1, fc1_bias, fc2, fc2_bias) if w is not None} | {block.x.dtype or fc1.dtype}
    if len(dtypes) != 1 or not dtypes <= FLOATS:
        raise Declined(f"x and the weights are {', '.join(sorted(d.name for d in dtypes))}", node)
    fc2, fc2_bias, block = _with_factors(block, fc2, fc2_bias, node, rounds=rounds)
    return (fc1, fc1_bias, fc2, fc2_bias), block


def _with_factors(
    block: Block, fc2: View, fc2_bias: View | None, node: ir.Node, *, rounds: bool
) -> tuple[View, View | None, Block]:
    """fc2 and its bias times what the router multiplies each expert with, and the block without that."""
    mixing = block.mixing
    half = fc2.dtype != ir.DataType.FLOAT
    rounds = rounds and fc2_bias is None
    if mixing.table is not None and half and not rounds:
        what = "weights" if fc2_bias is None else "bias"
        raise Declined(f"a factor for each expert would round its {fc2.dtype.name} {what}", node)
    factors = np.ones(len(block.experts)) if mixing.table is None else np.asarray(mixing.table.numpy(), np.float64)
    if half and rounds:
        factors, mixing = factors * mixing.scale, replace(mixing, scale=1.0)
    numbers = factors.tolist()
    bias = None if fc2_bias is None else scaled(fc2_bias, numbers)
    return scaled(fc2, numbers), bias, replace(block, mixing=mixing)


def _elements(view: View) -> tuple[object, ...]:
    """Equal for views of the same elements, in whatever order."""
    return view.source, view.offset, tuple(sorted(zip(view.strides, view.shape, strict=True)))


def _projection(linears: Sequence[Linear], what: str, node: ir.Node) -> tuple[View, View | None]:
    views = [_dense(linear.weight, what, node) for linear in linears]
    require_alike(views, what, node)
    biases = [linear.bias for linear in linears]
    has_bias = require_alike(biases, f"bias of {what}", node)
    return stacked(views), stacked([b for b in biases if b is not None]) if has_bias else None


def _dense(weight: object, what: str, node: ir.Node) -> View:
    if not isinstance(weight, Dense):
        raise Declined(f"{what} is quantized, and down is not", node)
    return weight.view


def _zeros(weight: View) -> View:
    return View.whole(ir.tensor(np.zeros(weight.shape[:2], weight.dtype.numpy()), name="zeros"), "zeros")


def rule(*, into: Literal["MoE", "QMoE"] = "MoE") -> list[Rule]:
    """Builds the rule, at every operator that completes a block.

    Args:
        into: QMoE fuses only what rule moe-to-qmoe will quantize, so that a rule set can quantize the rest unfused.
    """
    return [*(FuseExperts(op_type, into) for op_type in _COMPLETING), Unfused(), UnfusedArgMax()]
