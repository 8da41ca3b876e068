"""MoE with biases that are all zero -> MoE without them.

Matched:      MoE(x, router_probs, fc1, fc1_bias, fc2, fc2_bias[, fc3, fc3_bias]), a bias a constant of zeros
Replacement:  the same MoE, that bias left out
Declines when:
              never: a bias that depends on an input, or is not zero, stays; so does an MoE that the target cannot run
Source:       the model builder of onnxruntime-genai writes zeros for models without biases (LFM2, Qwen3.5)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from rewriter.emit import write_operator
from rewriter.facts import Facts
from rewriter.operators.form import form_of
from rewriter.operators.moe import MOE
from rewriter.operators.operator import DOMAIN
from rewriter.rule import NotApplicable, Rule
from rewriter.rules.blocks.at_operator import AtOperator
from rewriter.tensors import View


class MoEDropZeroBiases(AtOperator):
    """The rule at an MoE."""

    def __init__(self) -> None:
        super().__init__("moe-drop-zero-biases", MOE.name, DOMAIN)

    def replace(self, op: Any, node: ir.Node) -> Any:
        biases = [slots.bias for slots in MOE.projections if slots.bias < len(node.inputs)]
        zeros = {slot for slot in biases if _is_zero(self.run.facts, node.inputs[slot])}
        form, kernels = form_of(node), self.run.target.kernels(MOE.name)
        unknown = form.unknown or any(form.activation not in kernel.activations for kernel in kernels)
        if not zeros or unknown:  # of an activation that nothing runs, nothing could be proved
            raise NotApplicable
        inputs = [None if slot in zeros else value for slot, value in enumerate(node.inputs)]
        return write_operator(op, MOE, inputs, form.attributes())


def _is_zero(facts: Facts, bias: ir.Value | None) -> bool:
    """True for a constant of zeros; read expert by expert, and no further than the first that is not zero."""
    view = facts.get(bias, View)
    if view is None or view.rank != 2:
        return False
    return facts.derived(bias, _Zeros, lambda: _Zeros(_all_zero(view))).all if bias is not None else False


class _Zeros:
    """Whether a constant holds zeros only; kept, since every sweep asks again."""

    def __init__(self, all_zero: bool) -> None:
        self.all = all_zero


def _all_zero(view: View) -> bool:
    return not any(np.any(view.index(0, expert).numpy()) for expert in range(view.shape[0]))


def rule() -> Rule:
    """Builds the rule."""
    return MoEDropZeroBiases()
