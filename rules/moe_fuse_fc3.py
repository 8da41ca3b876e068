"""MoE gated by an fc3 -> MoE with gate and linear half interleaved in fc1 (SwiGLU), where the target lacks the former.

Matched:      MoE(x, router_probs, fc1, fc1_bias?, fc2, fc2_bias?, fc3, fc3_bias?): act(fc1 x) * fc3 x
Replacement:  MoE(x, router_probs, fc1', fc1_bias'?, fc2, fc2_bias?) with swiglu_fusion=1: rows of fc1 and fc3 in turn
Declines when:
              the activation is not silu or swiglu: no fused form gates relu, gelu or identity
              silu comes with alpha, beta or a limit, which nothing defines
              fc1, fc3 or a bias is not constant
              the target runs the result neither as MoE nor as QMoE
              the float weights would stay in the model beside their copy
Source:       transformers' exporter with ONNX Runtime's fusions; silu(g) * l is SwiGLU of alpha 1, beta 0, no limit
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import onnx_ir as ir

from rewriter.operators.activation import SILU, SWIGLU
from rewriter.operators.moe import MOE
from rewriter.operators.operator import DOMAIN, input_at
from rewriter.operators.qmoe import QMOE
from rewriter.rule import Declined, NotApplicable, Rule
from rewriter.rules.blocks.at_operator import AtOperator
from rewriter.rules.blocks.moe import (
    Experts,
    constant_bias,
    emit_moe,
    interleaved,
    read_moe,
    require_weights_disappear,
)
from rewriter.tensors import View


class MoEFuseFc3(AtOperator):
    """The rule at an MoE."""

    def __init__(self) -> None:
        super().__init__("moe-fuse-fc3", MOE.name, DOMAIN)

    def replace(self, op: Any, node: ir.Node) -> Any:
        if input_at(node, MOE.projections[2].weight) is None:
            raise NotApplicable
        experts = read_moe(self.run, node)
        form = experts.form
        if any(form.activation in kernel.fc3 for kernel in self.run.target.kernels(QMOE.name)):
            raise NotApplicable
        if form.activation not in (SILU.name, SWIGLU.name):
            raise Declined(f"'{form.activation}' gated by fc3 has no fused form; silu and swiglu have", node)
        if form.activation == SILU.name and (form.alpha, form.beta, form.limit) != (1.0, 0.0, math.inf):
            raise Declined("silu gated by fc3 with alpha, beta or a limit is defined nowhere", node)
        require_weights_disappear(self.run.facts, experts, rearranged=True)
        fc1, fc2, fc3 = experts.projections
        bias = self._bias(experts)
        weights = [
            op.initializer(interleaved(fc1.weight, fc3.weight)),
            None if bias is None else op.initializer(interleaved(*bias)),
            fc2.value,
            fc2.bias,
        ]
        return emit_moe(
            self.run, op, experts, dataclasses.replace(form, activation=SWIGLU.name, fusion=1, gated=False), weights
        )

    def _bias(self, experts: Experts) -> tuple[View, View] | None:
        """The biases of gate and linear half [E, I]; zeros where only one has one."""
        fc1, _, fc3 = experts.projections
        gate, linear = constant_bias(self.run, fc1), constant_bias(self.run, fc3)
        known = gate or linear
        if known is None:
            return None
        zeros = View.whole(ir.tensor(np.zeros(known.shape, known.dtype.numpy())), f"{known.name}__zeros")
        return gate or zeros, linear or zeros


def rule() -> Rule:
    """Builds the rule."""
    return MoEFuseFc3()
