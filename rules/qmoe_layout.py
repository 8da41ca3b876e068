"""QMoE with its weights in one layout -> the same QMoE with them in another: raw, or CUTLASS for sm80 or sm90.

Matched:      QMoE(x, router_probs, fc1 codes, .., fc2 codes, ..), the codes constant
Replacement:  the same QMoE with the codes laid out anew; scales, zero points and biases as they are
Declines when:
              nothing tells in which layout the weights are
              the target does not read the wanted layout, or N and K do not allow it
Source:       com.microsoft::QMoE; CUDA exports hold prepacked weights, which other providers refuse or read as garbage
"""

from __future__ import annotations

from typing import Any, Literal

import onnx_ir as ir

from rewriter.graph.declines import OTHER_TARGET
from rewriter.operators.form import SLOTS
from rewriter.operators.layout import qmoe
from rewriter.operators.layout.qmoe import LAYOUT_KEY
from rewriter.rule import Declined, NotApplicable, Rule
from rewriter.rules.blocks.moe import DOMAIN
from rewriter.rules.blocks.stored_qmoe import ExpertRows, LayoutName, StoredProjection, read_qmoe


class QMoELayout(Rule):
    """The rule at a QMoE."""

    def __init__(self, layout: LayoutName | Literal["auto"], unmarked: LayoutName | None) -> None:
        super().__init__(name="qmoe-layout")
        self._layout = layout
        self._unmarked = unmarked

    def pattern(self, op: Any, x: Any) -> Any:
        return op.QMoE(x, _allow_other_inputs=True, _domain=DOMAIN, _outputs=["y"])

    def rewrite(self, op: Any, *, x: ir.Value, y: ir.Value) -> Any:
        del x
        stored = read_qmoe(self.run, y, self._unmarked)
        node = stored.node
        wanted = self._wanted(node)
        if wanted == stored.prepacked:
            raise NotApplicable
        for projection in stored.projections:
            args = (projection.n, projection.k, projection.bits, projection.block)
            if reason := qmoe.illegal(*args, prepacked=wanted):
                raise Declined(f"{projection.name}: {reason}", node)
        if stored.prepacked is not None:  # the proof reads the matched node by the layout that its metadata names
            node.metadata_props[LAYOUT_KEY] = qmoe.layout_name(stored.prepacked)
        inputs = list(node.inputs)
        for slot, projection in zip(SLOTS["QMoE"]["weight"], stored.projections, strict=False):
            inputs[slot] = op.initializer(_laid_out(projection, stored.prepacked, wanted))
        attributes: dict[str, Any] = {name: attribute.value for name, attribute in node.attributes.items()}
        attributes.pop("weights_prepacked", None)
        if self.run.target.has("QMoE", "weights_prepacked"):
            attributes["weights_prepacked"] = int(wanted is not None)
        out = op.QMoE(*inputs, _domain=DOMAIN, **attributes)
        out.producer().metadata_props[LAYOUT_KEY] = qmoe.layout_name(wanted)
        return out

    def _wanted(self, node: ir.Node) -> int | None:
        target = self.run.target
        layouts = target.qmoe_layouts
        if not layouts:
            raise Declined(f"target {target} reads no layout of QMoE that is known here", node, remedy=OTHER_TARGET)
        wanted = layouts[0] if self._layout == "auto" else qmoe.layout_of(self._layout)
        if wanted not in layouts:
            known = ", ".join(map(qmoe.layout_name, layouts))
            raise Declined(
                f"QMoE on target {target} reads {known}, not {qmoe.layout_name(wanted)}", node, remedy=OTHER_TARGET
            )
        return wanted


def _laid_out(projection: StoredProjection, before: int | None, after: int | None) -> ExpertRows:
    p = projection
    symmetric = p.zero_points is None
    shape, _, _ = qmoe.shapes(p.codes.shape[0], p.n, p.k, p.bits, p.block, symmetric=symmetric, prepacked=after)
    return ExpertRows(
        p,
        lambda index: qmoe.pack(p.expert(index, before), prepacked=after).weight,
        ir.DataType.UINT8,
        shape,
        f"{qmoe.layout_name(before)}-to-{qmoe.layout_name(after)}",
        qmoe.layout_name(after),
    )


def rule(*, layout: LayoutName | Literal["auto"] = "auto", unmarked: LayoutName | None = None) -> Rule:
    """Builds the rule.

    Args:
        layout: what the weights are to be in; auto is what the target prefers.
        unmarked: layout of weights of which neither metadata, attribute nor shapes tell it; null declines there.
    """
    return QMoELayout(layout, unmarked)
