"""The former name of fuse-experts for blocks of MatMulNBits; rule sets that name both still load.

Matched:      what fuse-experts matches, every projection of every expert a MatMulNBits
Replacement:  what fuse-experts writes: QMoE, codes unchanged byte for byte
Declines when:
              fuse-experts does
Source:       rule sets written before fuse-experts took quantized experts too; name fuse-experts alone instead
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from rewriter.operators.form import FLOAT_EXPERTS
from rewriter.rule import NotApplicable, Replacement, Rule
from rewriter.rules.blocks.block import Block
from rewriter.rules.fuse_experts import COMPLETING, FuseExperts


class FuseQuantizedExperts(FuseExperts):
    """The rule at one operator that completes a block, for quantized experts alone."""

    def __init__(self, op_type: str) -> None:
        super().__init__(op_type, FLOAT_EXPERTS)
        self.name = "fuse-quantized-experts"

    def _float(self, op: Any, block: Block, node: ir.Node) -> Replacement:
        raise NotApplicable


def rule() -> list[Rule]:
    """Builds the rule, at every operator that completes a block."""
    return [FuseQuantizedExperts(op_type) for op_type in COMPLETING]
