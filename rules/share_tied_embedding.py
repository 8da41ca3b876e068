"""An embedding and an output projection stored apart though they are equal -> one float table that both read.

Matched:      Gather(w, ids) and MatMul(x, v), or Gemm; w [V, H] and v.T constant and equal (compared, byte by byte)
Replacement:  MatMul(x, Transpose(w)), or Gemm on w itself; the Gather stays as it is
Declines when:
              the two are of one shape but not equal
              something else reads either of them, or a reader sits in another graph
              they take fewer bytes than min_bytes
Source:       exporters that save a tied model's state as two tensors; mobius writes the replacement's form
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from rewriter.graph.attributes import integer_attribute
from rewriter.rule import NotApplicable, Rule
from rewriter.rules.blocks.readers import origin
from rewriter.rules.blocks.tied import read_table
from rewriter.tensors import View


class ShareTiedEmbedding(Rule):
    """The rule at the Gather."""

    def __init__(self, min_bytes: int) -> None:
        super().__init__(name="share-tied-embedding", remove_nodes=False)
        self._min_bytes = min_bytes

    def pattern(self, op: Any, w: Any, ids: Any) -> Any:
        return op.Gather(w, ids, _outputs=["y"])

    def rewrite(self, op: Any, *, w: ir.Value, ids: ir.Value, y: ir.Value) -> Mapping[ir.Value, ir.Value]:
        node = y.producer()
        assert node is not None
        facts = self.run.facts
        table = read_table(self.run, node, self._min_bytes)
        if table.shared:
            raise NotApplicable
        (head, _), *_ = table.heads
        by_rows = head.op_type == "Gemm" and bool(integer_attribute(head, "transB", 0))
        wanted = table.view if by_rows else table.view.T
        stored = next((v for v in (w, origin(facts, w)) if facts.get(v, View) == wanted), None)
        weight = op.Transpose(w, perm=[1, 0]) if stored is None else stored
        inputs = [weight if index == 1 else value for index, value in enumerate(head.inputs)]
        if head.op_type == "MatMul":
            return {head.outputs[0]: op.MatMul(*inputs)}
        return {head.outputs[0]: op.Gemm(*inputs, **{a.name: a.value for a in head.attributes.values()})}


def rule(*, min_bytes: int = 4096) -> Rule:
    """Builds the rule.

    Args:
        min_bytes: smaller tables stay as they are.
    """
    return ShareTiedEmbedding(min_bytes)
