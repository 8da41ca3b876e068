"""QMoE -> MoE: the experts dequantized, to be compared with or quantized anew.

Matched:      QMoE(x, router_probs, fc1 codes, scales, bias, .., zero points, router_weights?), the weights constant
Replacement:  MoE(x, router_probs, fc1, fc1_bias, fc2, fc2_bias[, fc3, fc3_bias]); weights computed when they are read
Declines when:
              router_weights are anything but Softmax(router_probs): MoE mixes by its own logits
              there are none, normalize_routing_weights is 0, and the target's MoE does not heed it
              quant_type is not int
              nothing tells in which layout the weights are
Source:       com.microsoft::QMoE and MoE
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from rewriter.emit import write_operator
from rewriter.graph.attributes import integer_attribute
from rewriter.graph.declines import no_kernel
from rewriter.operators.layout.stored import Layout
from rewriter.operators.moe import MOE
from rewriter.operators.operator import DOMAIN
from rewriter.operators.qmoe import QMOE, LayoutName
from rewriter.rule import Declined, NotApplicable, Replacement, Rule, Run
from rewriter.rules.blocks.at_operator import AtOperator
from rewriter.rules.blocks.guards import require_float
from rewriter.rules.blocks.moe import flat_router
from rewriter.rules.blocks.stored_qmoe import ExpertRows, StoredExperts, StoredProjection, read_qmoe


class QMoEToMoE(AtOperator):
    """The rule at a QMoE."""

    def __init__(self, unmarked: LayoutName | None) -> None:
        super().__init__("qmoe-to-moe", QMOE.name, DOMAIN)
        self._unmarked = unmarked

    def replace(self, op: Any, node: ir.Node) -> Replacement:
        x, router = node.inputs[:2]
        if x is None or router is None:
            raise NotApplicable
        dtype = require_float(x)
        stored = read_qmoe(self.run, node, self._unmarked)
        _require_own_weights(stored, router)
        _require_heeded(self.run, stored, dtype)
        inputs: list[ir.Value | None] = [x, flat_router(op, router, stored.projections[0].codes.shape[0])]
        for projection in stored.projections:
            inputs += [op.initializer(_dequantized(projection, stored.layout, dtype)), projection.bias]
        out = write_operator(op, MOE, inputs, stored.form.attributes())
        return Replacement({node.outputs[0]: out}, [node], layouts={node: stored.layout.name})


def _require_own_weights(stored: StoredExperts, router: ir.Value) -> None:
    weights = stored.router_weights
    if weights is None:
        return
    producer = weights.producer()
    if producer is None or (producer.domain, producer.op_type) != ("", "Softmax") or producer.inputs[0] is not router:
        raise Declined("router_weights are not Softmax(router_probs), and MoE has no such input", weights)
    rank = None if router.shape is None else router.shape.rank()
    if integer_attribute(producer, "axis", -1) not in (-1, rank and rank - 1):
        raise Declined("router_weights are a Softmax over another axis than the experts", producer)


def _require_heeded(run: Run, stored: StoredExperts, dtype: ir.DataType) -> None:
    """Declines where the weights of the chosen add up to less than one and the target's MoE does not keep them so."""
    form, kernels = stored.form, run.target.kernels(MOE.name)
    if form.normalize or form.sparse_mixer or stored.router_weights is not None:
        return
    if any(dtype.name not in kernel.unnormalized for kernel in kernels):
        reason = f"normalize_routing_weights=0 is not heeded in {dtype.name.lower()}"
        raise no_kernel(MOE.name, run.target, reason, stored.node)


def _dequantized(projection: StoredProjection, layout: Layout, dtype: ir.DataType) -> ExpertRows:
    shape = (projection.codes.shape[0], projection.shape.n, projection.shape.k)
    return ExpertRows(
        projection,
        lambda index: projection.expert(index, layout).dequantize().astype(dtype.numpy()),
        dtype,
        shape,
        f"dequantized-{layout.name}",
        "dequantized",
    )


def rule(*, unmarked: LayoutName | None = None) -> Rule:
    """Builds the rule.

    Args:
        unmarked: layout of weights of which neither metadata, attribute nor shapes tell it; null declines there.
    """
    return QMoEToMoE(unmarked)
