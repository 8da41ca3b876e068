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
from rewriter.operators.layout.stored import Layout, Refusal, Stored
from rewriter.operators.operator import DOMAIN
from rewriter.operators.qmoe import QMOE, LayoutName, layout_named
from rewriter.rule import Declined, NotApplicable, Replacement, Rule
from rewriter.rules.blocks.qmoe import prepacked_attribute, write_qmoe
from rewriter.rules.blocks.stored_qmoe import ExpertRows, StoredProjection, read_qmoe


class QMoELayout(Rule):
    """The rule at a QMoE."""

    def __init__(self, layout: LayoutName | Literal["auto"], unmarked: LayoutName | None) -> None:
        super().__init__(name="qmoe-layout")
        self._layout = layout
        self._unmarked = unmarked

    def pattern(self, op: Any, x: Any) -> Any:
        return op.QMoE(x, _allow_other_inputs=True, _domain=DOMAIN, _outputs=["y"])

    def rewrite(self, op: Any, *, x: ir.Value, y: ir.Value) -> Replacement:
        del x
        stored = read_qmoe(self.run, y, self._unmarked)
        node = stored.node
        wanted = self._wanted(node)
        if wanted is stored.layout:
            raise NotApplicable
        inputs = dict(enumerate(node.inputs))
        for slots, projection in zip(QMOE.projections, stored.projections, strict=False):
            own = wanted.of(projection.shape)
            if isinstance(own, Refusal):
                raise Declined(f"{projection.name}: {own.reason}", node)
            inputs[slots.weight] = op.initializer(_laid_out(projection, stored.layout, own))
        attributes: dict[str, Any] = {name: attribute.value for name, attribute in node.attributes.items()}
        attributes.pop("weights_prepacked", None)
        attributes |= prepacked_attribute(self.run.target, wanted)
        out = write_qmoe(op, inputs, attributes, wanted)
        return Replacement({y: out}, [node], layouts={node: stored.layout.name})

    def _wanted(self, node: ir.Node) -> Layout:
        target = self.run.target
        layouts = target.qmoe_layouts
        if not layouts:
            raise Declined(f"target {target} reads no layout of QMoE that is known here", node, remedy=OTHER_TARGET)
        wanted = layouts[0] if self._layout == "auto" else self._layout
        if wanted not in layouts:
            raise Declined(
                f"QMoE on target {target} reads {', '.join(layouts)}, not {wanted}", node, remedy=OTHER_TARGET
            )
        return layout_named(wanted)


def _laid_out(projection: StoredProjection, before: Layout, after: Stored) -> ExpertRows:
    return ExpertRows(
        projection,
        lambda index: after.pack_codes(projection.expert(index, before).codes),
        ir.DataType.UINT8,
        (projection.codes.shape[0], *after.codes),
        f"{before.name}-to-{after.layout.name}",
        after.layout.name,
    )


def rule(*, layout: LayoutName | Literal["auto"] = "auto", unmarked: LayoutName | None = None) -> Rule:
    """Builds the rule.

    Args:
        layout: what the weights are to be in; auto is what the target prefers.
        unmarked: layout of weights of which neither metadata, attribute nor shapes tell it; null declines there.
    """
    return QMoELayout(layout, unmarked)
