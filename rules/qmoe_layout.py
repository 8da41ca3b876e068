"""QMoE with its weights in one layout -> the same QMoE with them in another: raw, or CUTLASS for sm80 or sm90.

Matched:      QMoE(x, router_probs, fc1 codes, .., fc2 codes, ..), the codes constant
Replacement:  the same QMoE with the codes laid out anew; scales, zero points and biases as they are
Declines when:
              nothing tells in which layout the weights are
              the target does not read the wanted layout, or N and K do not allow it
              its kernel rounds activations to 8 bits, which the run does not accept
Source:       com.microsoft::QMoE; CUDA exports hold prepacked weights, which other providers refuse or read as garbage
"""

from __future__ import annotations

from typing import Any, Literal

import onnx_ir as ir

from rewriter.graph.declines import Reason, no_kernel, reason_of
from rewriter.operators.layout.stored import Layout, Stored
from rewriter.operators.operator import DOMAIN
from rewriter.operators.qmoe import QMOE, LayoutName, layout_named
from rewriter.rule import NotApplicable, Replacement, Rule
from rewriter.rules.blocks.at_operator import AtOperator
from rewriter.rules.blocks.qmoe import prepacked_attribute, refusal, write_qmoe
from rewriter.rules.blocks.stored_qmoe import ExpertRows, StoredExperts, StoredProjection, dtype_name, read_qmoe
from rewriter.target import Kernel


class QMoELayout(AtOperator):
    """The rule at a QMoE."""

    def __init__(self, layout: LayoutName | Literal["auto"], unmarked: LayoutName | None) -> None:
        super().__init__("qmoe-layout", QMOE.name, DOMAIN)
        self._layout = layout
        self._unmarked = unmarked

    def replace(self, op: Any, node: ir.Node) -> Replacement:
        stored = read_qmoe(self.run, node, self._unmarked)
        kernel, wanted = self._wanted(stored)
        if wanted is stored.layout:
            raise NotApplicable
        inputs = dict(enumerate(node.inputs))
        for slots, projection in zip(QMOE.projections, stored.projections, strict=False):
            own = wanted.require(projection.shape)
            inputs[slots.weight] = op.initializer(_laid_out(projection, stored.layout, own))
        attributes: dict[str, Any] = {name: attribute.value for name, attribute in node.attributes.items()}
        attributes.pop("weights_prepacked", None)
        attributes |= prepacked_attribute(self.run.target, wanted, stored.projections[0].shape.format)
        out = write_qmoe(op, self.run, kernel, inputs, attributes, wanted, node)
        return Replacement({node.outputs[0]: out}, [node], layouts={node: stored.layout.name})

    def _wanted(self, stored: StoredExperts) -> tuple[Kernel, Layout]:
        """Returns a kernel and the layout that is asked for, by default the first that one reads; or declines."""
        target, shapes = self.run.target, [projection.shape for projection in stored.projections]
        dtype = dtype_name(stored.node)
        kernels = target.runs(QMOE.name, stored.form, dtype, weighted=stored.router_weights is not None)
        reason: Reason | None = None
        for kernel in target.kernels(QMOE.name) if isinstance(kernels, str) else kernels:
            for name in kernel.layouts if self._layout == "auto" else [self._layout]:
                layout = layout_named(name)
                found = refusal(kernel, shapes, layout)
                if found is None:
                    return kernel, layout
                reason = reason or reason_of(found)
        raise no_kernel(QMOE.name, target, reason or "it reads no layout that is known here", stored.node)


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
