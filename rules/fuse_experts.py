"""A whole MoE block in plain operators -> com.microsoft::MoE; of MatMulNBits -> QMoE with the same codes.

Equal only but for ties: among equal logits TopK takes the first and ONNX Runtime's kernels the last, and the softmax of
log-sigmoids that a normalised sigmoid becomes tells apart what a saturated sigmoid does not.

Matched:      the Add, Mul, ReduceSum, MatMul, Einsum or scatter, or the Cast that ends it where halves are summed in
              float32, that completes sum_e share_e(logits) * (down_e @ act(gate_e @ x) * (up_e @ x)), however it is
              written; the projections all float, or all MatMulNBits
Replacement:  MoE(x, logits [T, E], fc1, fc1_bias?, fc2, fc2_bias?), its weights lazy stacks; gate and up rows in turn;
              a factor for each expert goes into its fc2, one for all into a Mul behind. Weights that are no function
              of the logits, as DeepSeek-V3 selects by biased scores and mixes by others: their logarithms, scattered
              where their experts are, are the logits, and their sum is the Mul behind.
              Quantized: QMoE(x, logits [T, E], fc1 codes, scales, bias?, fc2 codes, scales, bias?, -, -, -, zero
              points?, -, router_weights?), codes unchanged byte for byte; a factor for each expert goes into fc2's
              scales
Declines when:
              an expert is missing, is there twice, reads another x or has another activation
              the activation or the routing is none that the operator has
              the target's operator does not run it, not in this dtype, or rounds activations at these bits
              something else reads a value inside of the block, or its weights; two of gate, up and down are one
              an operator between a router's choice and the sum is none that the recognisers know
              biases of float16 or bfloat16 would have to be scaled, or weights that are not quantized next
              bits, block sizes or zero points differ between quantized experts, or in a way that QMoE has not
              a quantized row does not fill its last block, or the scales have another type than x
Source:       mobius, transformers (eager, batched_mm, grouped_mm) and torch.onnx, as the recognisers list them; int4
              exports of unrolled blocks: mobius, onnxruntime's MatMulNBits quantizer, Olive
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import onnx_ir as ir

from rewriter.emit import write_operator
from rewriter.facts import Transfer
from rewriter.graph.declines import BY_EXPERT, no_kernel
from rewriter.graph.walk import readers, walk
from rewriter.operators.form import FLOAT_EXPERTS, PROJECTIONS, ExpertForm, ExpertsName
from rewriter.operators.moe import MOE
from rewriter.operators.qmoe import QMOE, RAW, ROUTER_WEIGHTS
from rewriter.rule import Declined, NotApplicable, Replacement, Rule, Run
from rewriter.rules.blocks import experts
from rewriter.rules.blocks.alike import same_expert
from rewriter.rules.blocks.at_operator import AtOperator
from rewriter.rules.blocks.block import Block, read_block
from rewriter.rules.blocks.contents import Composed, Packed
from rewriter.rules.blocks.decline_reasons import (
    chooses_experts,
    decline_dispatch,
    decline_unfused,
    reads_stack,
)
from rewriter.rules.blocks.emit import (
    facts_dtype,
    form_of,
    in_the_blocks_shape,
    logits_of,
    logits_of_given,
    proof_inputs,
    times_total,
    unflattened,
    weights_of,
)
from rewriter.rules.blocks.float_weights import FloatWeights, stack_float_weights
from rewriter.rules.blocks.matched_nodes import MatchedNodes, matched_nodes_of, require_weights_go
from rewriter.rules.blocks.moe import Experts, Projection
from rewriter.rules.blocks.qmoe import (
    carried_accuracy_level,
    exact_kernels,
    plan_experts,
    prepacked_attribute,
    qmoe_attributes,
    require_accepted_rounding,
    write_qmoe,
)
from rewriter.rules.blocks.quantized_weights import require_kernel, stack_quantized_weights
from rewriter.rules.blocks.routing import Routing, computed_in, normalised, resolve, resolve_given
from rewriter.rules.blocks.sums import whole_sum
from rewriter.target import Target
from rewriter.tensors import View, ViewTensor

Decline = Callable[[Run, ir.Node, Sequence[str]], None]
COMPLETING = ("Add", "Mul", "ReduceSum", "Cast", "MatMul", "Einsum", "ScatterND", "ScatterElements")


class FuseExperts(AtOperator):
    """The rule at one operator that completes a block."""

    recognisers: ClassVar[Iterable[Transfer]] = experts.RECOGNISERS

    def __init__(self, op_type: str, into: ExpertsName) -> None:
        super().__init__("fuse-experts", op_type)
        self._into = into

    def may_begin(self, node: ir.Node) -> bool:
        return whole_sum(self.run.facts, node.outputs[0]) is not None

    def replace(self, op: Any, node: ir.Node) -> Replacement:
        block = unflattened(self.run.facts, read_block(self.run.facts, node.outputs[0]))
        if isinstance(block.experts[0].down, Packed):
            return self._quantized(op, block, node)
        return self._float(op, block, node)

    def _float(self, op: Any, block: Block, node: ir.Node) -> Replacement:
        facts, y = self.run.facts, block.out
        block, form, routing, weights, own = self._planned(block, node)
        kept = [view for view in weights if view is not None]
        require_weights_go(facts, own.going, kept, lambda other: self._alike(block, form, other))
        nodes = own.nodes
        fed = proof_inputs(facts, block, routing, nodes)
        total = None if routing.total is None else (routing.total, block.mixing.router.k)
        if routing.given is None:
            logits = logits_of(op, facts, routing, weights[0].dtype, block.mixing.router.experts)
        else:
            logits, total = logits_of_given(op, facts, routing.given, block, weights[0].dtype)
        values = [None if w is None else op.initializer(ViewTensor(w)) for w in weights]

        def moe(x: ir.Value) -> ir.Value:
            if routing.before is not None:
                late = block.mixing.value is None
                before = op.Sigmoid(routing.before) if late else routing.before
                x = times_total(op, facts, x, x, (before, 1), block)
            out = write_operator(op, MOE, [x, logits, *values], form.attributes())
            return out if total is None else times_total(op, facts, out, x, total, block)

        return Replacement({y: in_the_blocks_shape(op, facts, block, moe, node)}, nodes, fed)

    def _planned(self, block: Block, node: ir.Node) -> tuple[Block, ExpertForm, Routing, FloatWeights, MatchedNodes]:
        """What a float block becomes, and which of its nodes go; declines where no operator computes it."""
        facts = self.run.facts
        dtype = facts_dtype(block)
        factors = self._into == QMOE.name and all(expert.bias is None for expert in block.experts)
        routing = resolve_given(facts, block, dtype, factors=factors) or resolve(block.mixing, node)
        if routing.weights is not None:
            composed = facts.get(block.mixing.dense, Composed)
            if composed is not None:
                raise Declined(f"no operator has the score function {composed.text}", block.mixing.dense)
            reason = "the router's weights are no softmax and no normalised sigmoid of its logits"
            raise Declined(reason if self._into == QMOE.name else f"{reason}; only QMoE takes such", node)
        if routing.given is not None:
            block = replace(block, mixing=replace(block.mixing, table=None))
        form, routing = self._form(block, routing, dtype, node)
        if routing.total is not None:
            block = replace(block, mixing=replace(block.mixing, scale=1.0))
        weights, block = stack_float_weights(block, node, rounds=self._into == QMOE.name)
        own = matched_nodes_of(facts, block, routing)
        if self._into == QMOE.name:
            self._require_quantizable(block, form, weights, own.nodes)
        return block, form, routing, weights, own

    def _alike(self, block: Block, form: ExpertForm, reader: ir.Node) -> Sequence[ir.Node]:
        """The nodes that go with the block that a node is of, where it becomes the same operator on these experts."""
        with contextlib.suppress(Declined):
            for value in walk(reader.outputs, lambda at: [out for n in readers(at) for out in n.outputs]):
                end = value.producer()
                if end is None or end.op_type not in COMPLETING:
                    continue
                with contextlib.suppress(NotApplicable):
                    other = unflattened(self.run.facts, read_block(self.run.facts, value))
                    same = len(other.experts) == len(block.experts) and all(
                        same_expert(a.on(block.x), b) for a, b in zip(other.experts, block.experts, strict=True)
                    )
                    if not same:
                        break
                    _, own, _, _, there = self._planned(other, end)
                    return there.going if own == form else ()
        return ()

    def _form(self, block: Block, routing: Routing, dtype: ir.DataType, node: ir.Node) -> tuple[ExpertForm, Routing]:
        form = form_of(block, routing)
        target = self.run.target
        reason = _refusal(target, self._into, form, dtype)
        other = normalised(self.run.facts, block.mixing, routing) if reason else None
        if other is not None and not _refusal(target, self._into, form_of(block, other), dtype):
            return form_of(block, other), other
        if reason:
            raise no_kernel(self._into, target, reason, node, instead=BY_EXPERT)
        return form, routing

    def _require_quantizable(
        self, block: Block, form: ExpertForm, weights: FloatWeights, nodes: Sequence[ir.Node]
    ) -> None:
        """Declines where rule moe-to-qmoe would leave the experts in float, though not all are meant to be."""
        run, target = self.run, self.run.target
        reader = next((n for n in nodes if run.role(n).name.startswith("expert")), nodes[0])
        projections = tuple(
            Projection(name, block.out, weight, None)
            for name, weight in zip(PROJECTIONS, (weights[0], weights[2]), strict=False)
        )
        own = Experts(reader, form, block.x, block.mixing.router.scores.logits, weights[0].dtype, projections)
        choices = exact_kernels(target, form, weights[0].dtype)
        assert not isinstance(choices, str), "the form was asked for before"
        held = plan_experts(run, own, choices)
        attributes = qmoe_attributes(target, form, held)
        require_accepted_rounding(run, held.choice.kernel, attributes, block.out, instead=BY_EXPERT)

    def _quantized(self, op: Any, block: Block, node: ir.Node) -> Replacement:
        facts, target = self.run.facts, self.run.target
        routing, dtype = resolve(block.mixing, node), facts_dtype(block)
        if dtype != ir.DataType.FLOAT and computed_in(routing.logits) == ir.DataType.FLOAT:
            routing = resolve_given(facts, block, dtype) or routing
        if routing.given is not None:
            block = replace(block, mixing=replace(block.mixing, table=None, scale=1.0))
        fc1, fc2 = stack_quantized_weights(block, node)
        form = form_of(block, routing)
        dtype = fc1.scales.dtype
        choice = require_kernel(self.run, form, routing, dtype, (fc1, fc2), node)
        nodes = matched_nodes_of(facts, block, routing).nodes
        fed = proof_inputs(facts, block, routing, nodes)
        router = block.mixing.router.experts
        total = mixing = None
        if routing.given is None:
            logits = logits_of(op, facts, routing, dtype, router)
        else:
            logits, total = logits_of_given(op, facts, routing.given, block, dtype)
        if routing.weights is not None:
            mixing = weights_of(op, facts, routing.weights, dtype, router)
        elif choice.weighted:
            mixing = op.Softmax(logits, axis=-1)

        def tensor(view: View | None) -> ir.Value | None:
            value: ir.Value | None = None if view is None else op.initializer(ViewTensor(view))
            return value

        inputs: dict[int, ir.Value | None] = {1: logits, ROUTER_WEIGHTS: mixing}
        for slots, own in zip(QMOE.projections, (fc1, fc2), strict=False):
            inputs |= zip(slots.parts(), map(tensor, (own.codes, own.scales, own.zero_points)), strict=False)
            inputs[slots.bias] = tensor(own.bias)
        attributes = form.attributes() | {"expert_weight_bits": fc1.shape.bits, "block_size": fc1.shape.block}
        attributes |= prepacked_attribute(target, RAW) | carried_accuracy_level(target, nodes)

        def qmoe(x: ir.Value) -> ir.Value:
            out = write_qmoe(op, self.run, choice.kernel, inputs | {0: x}, attributes, RAW, node)
            return out if total is None else times_total(op, facts, out, x, total, block)

        return Replacement({block.out: in_the_blocks_shape(op, facts, block, qmoe, node)}, nodes, fed)


class Unfused(AtOperator):
    """Says at one operator why experts stay apart, where none completes a block."""

    recognisers: ClassVar[Iterable[Transfer]] = experts.RECOGNISERS
    explains: ClassVar[bool] = True

    def __init__(self, op_type: str, begins: Callable[[Run, ir.Node], bool], decline: Decline) -> None:
        super().__init__("fuse-experts", op_type, remove_nodes=False)  # one output of several is enough to match
        self._begins, self._decline = begins, decline

    def may_begin(self, node: ir.Node) -> bool:
        return self._begins(self.run, node)

    def replace(self, op: Any, node: ir.Node) -> Any:
        self._decline(self.run, node, COMPLETING)


def _refusal(target: Target, operator: ExpertsName, form: ExpertForm, dtype: ir.DataType) -> str | None:
    """Returns why the target has no exact MoE or QMoE of a form, or None."""
    found = exact_kernels(target, form, dtype) if operator == QMOE.name else target.runs(operator, form, dtype.name)
    return found if isinstance(found, str) else None


def rule(*, into: ExpertsName = FLOAT_EXPERTS) -> list[Rule]:
    """Builds the rule, at every operator that completes a block.

    Args:
        into: QMoE fuses only what rule moe-to-qmoe will quantize, so that a rule set can quantize the rest unfused.
    """
    return [
        *(FuseExperts(op_type, into) for op_type in COMPLETING),
        *(Unfused(op_type, chooses_experts, decline_unfused) for op_type in ("TopK", "ArgMax", "Gather", "GatherND")),
        *(Unfused(op_type, reads_stack, decline_dispatch) for op_type in ("MatMul", "Einsum")),
    ]
