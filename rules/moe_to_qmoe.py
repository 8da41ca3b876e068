"""MoE with constant expert weights -> QMoE.

Matched:      MoE(x, router_probs, fc1, fc1_bias?, fc2, fc2_bias?), the weights constant
Replacement:  QMoE(x, router_probs, fc1 codes, scales, bias, fc2 codes, scales, bias, -, -, -[, zero points])
              with Softmax(router_probs) as router_weights where the target does not heed normalize_routing_weights=0
Declines when:
              the target's QMoE lacks the activation, the fusion, fc3, the sparse mixer or the dtype
              the plan keeps an expert in float, or gives the experts of a stack different forms
              no block size that both H and I allow is left
              the float weights would stay in the model beside the quantized ones
              the kernel rounds activations to 8 bits, which the run does not accept
              it is a QMoE already
Source:       com.microsoft::QMoE; the model builder of onnxruntime-genai, mobius, transformers' exporter
"""

from __future__ import annotations

import dataclasses
from typing import Any

import onnx_ir as ir

from rewriter.emit import level_of
from rewriter.graph.declines import FROM_FLOAT, UNROLLED, no_kernel
from rewriter.operators.form import form_of
from rewriter.operators.moe import MOE
from rewriter.operators.operator import DOMAIN, input_at
from rewriter.operators.qmoe import LAYOUT_KEY, QMOE, ROUTER_WEIGHTS
from rewriter.quantize.plan import AccuracyLevel
from rewriter.rule import Declined, NotApplicable, Rule
from rewriter.rules.blocks.at_operator import AtOperator
from rewriter.rules.blocks.moe import element_type, read_moe, require_weights_disappear
from rewriter.rules.blocks.qmoe import QuantizedForm, emit_qmoe, exact_kernels, plan_experts, supports_accuracy_level
from rewriter.rules.blocks.stored_qmoe import dtype_name


class MoEToQMoE(AtOperator):
    """The rule at an MoE."""

    def __init__(self, accuracy_level: AccuracyLevel | None, smaller_blocks: bool) -> None:
        super().__init__("moe-to-qmoe", MOE.name, DOMAIN)
        self._accuracy_level = accuracy_level
        self._smaller_blocks = smaller_blocks

    def replace(self, op: Any, node: ir.Node) -> Any:
        choices = exact_kernels(self.run.target, form_of(node), element_type(node))
        if isinstance(choices, str):
            raise no_kernel(QMOE.name, self.run.target, choices, node, instead=UNROLLED)
        experts = read_moe(self.run, node)
        held = plan_experts(self.run, experts, choices, smaller_blocks=self._smaller_blocks, together=True)
        require_weights_disappear(self.run.facts, experts)
        return emit_qmoe(op, self.run, experts, self._with_accuracy_level(held))

    def _with_accuracy_level(self, held: QuantizedForm) -> QuantizedForm:
        heeded = supports_accuracy_level(self.run.target)
        return dataclasses.replace(held, accuracy_level=level_of(self.run, self._accuracy_level) if heeded else 0)


class QMoEStays(AtOperator):
    """The rule at a QMoE that was not written here: nothing is quantized twice."""

    def __init__(self) -> None:
        super().__init__("moe-to-qmoe", QMOE.name, DOMAIN)

    def replace(self, op: Any, node: ir.Node) -> Any:
        if LAYOUT_KEY in node.metadata_props:
            raise NotApplicable
        reason = "the experts are quantized already (rule qmoe-to-moe dequantizes them)"
        weighted = input_at(node, ROUTER_WEIGHTS) is not None
        dtype = dtype_name(node)
        kernels = self.run.target.runs(QMOE.name, form_of(node), dtype, weighted=weighted)
        if isinstance(kernels, str):
            reason += f", and target {self.run.target} cannot run them: {kernels}"
        raise Declined(reason, node, remedy=FROM_FLOAT)


def rule(*, accuracy_level: AccuracyLevel | None = None, smaller_blocks: bool = True) -> list[Rule]:
    """Builds the rule.

    Args:
        accuracy_level: 0 leaves it to the runtime, 4 allows activations of 8 bits, null is as the rule set says.
        smaller_blocks: whether the next smaller legal block is taken where the planned one does not divide H and I.
    """
    return [MoEToQMoE(accuracy_level, smaller_blocks), QMoEStays()]
