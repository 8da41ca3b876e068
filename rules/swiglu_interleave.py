"""MoE with concatenated SwiGLU (swiglu_fusion 2) -> interleaved (1), where the target has no kernel for the former.

Matched:      MoE(x, router_probs, fc1, fc1_bias?, ..) with swiglu_fusion=2: rows g0, g1, .., l0, l1, ..
Replacement:  the same MoE with swiglu_fusion=1: rows g0, l0, g1, l1, ..; weights are a lazy copy
Declines when:
              fc1 or its bias is not constant
              the target runs the result neither as MoE nor as QMoE
              the float weights would stay in the model beside their copy
Source:       com.microsoft::MoE; the CPU provider loads only swiglu_fusion=1
"""

from __future__ import annotations

import dataclasses
from typing import Any

import onnx_ir as ir

from rewriter.graph.attributes import integer_attribute
from rewriter.operators.moe import MOE
from rewriter.operators.operator import DOMAIN
from rewriter.operators.qmoe import QMOE
from rewriter.rule import NotApplicable, Rule
from rewriter.rules.blocks.at_operator import AtOperator
from rewriter.rules.blocks.moe import constant_bias, emit_moe, read_moe, require_weights_disappear
from rewriter.target import Target
from rewriter.tensors import View, ViewTensor


class SwigluInterleave(AtOperator):
    """The rule at an MoE."""

    def __init__(self) -> None:
        super().__init__("swiglu-interleave", MOE.name, DOMAIN)

    def replace(self, op: Any, node: ir.Node) -> Any:
        if integer_attribute(node, "swiglu_fusion", 0) != 2 or not _needs_turns(self.run.target):
            raise NotApplicable
        experts = read_moe(self.run, node)
        if not experts.form.glu:
            raise NotApplicable
        require_weights_disappear(self.run.facts, experts, rearranged=True)
        fc1, fc2 = experts.projections
        bias = constant_bias(self.run, fc1)
        weights = [
            op.initializer(halves_in_turn(fc1.weight)),
            None if bias is None else op.initializer(halves_in_turn(bias)),
            fc2.value,
            fc2.bias,
        ]
        return emit_moe(self.run, op, experts, dataclasses.replace(experts.form, fusion=1), weights)


def _needs_turns(target: Target) -> bool:
    """Whether the target's QMoE runs SwiGLU with gate and linear rows in turn, and not as halves."""
    fusions = {fusion for kernel in target.kernels(QMOE.name) for fusion in kernel.fusions}
    return 1 in fusions and 2 not in fusions


def halves_in_turn(view: View) -> ViewTensor:
    """Returns [E, 2 * I, ..] with the rows of both halves of ``view`` in turn."""
    e, both, *rest = view.shape
    halves = view.reshape((e, 2, both // 2, *rest))
    return ViewTensor(halves.transpose((0, 2, 1, *range(3, halves.rank))).reshape((e, both, *rest)))


def rule() -> Rule:
    """Builds the rule."""
    return SwigluInterleave()
