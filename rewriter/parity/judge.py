"""Whether a runtime's own numbers can prove a rewrite, or only the reference operators' can."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx_ir as ir

from rewriter.operators import gather_block_quantized, matmul_nbits
from rewriter.operators.form import form_of, operator_of
from rewriter.operators.gather_block_quantized import GATHER_BLOCK_QUANTIZED
from rewriter.operators.matmul_nbits import MATMUL_NBITS
from rewriter.operators.operator import input_at
from rewriter.operators.qmoe import LAYOUT_KEY, QMOE, RAW, ROUTER_WEIGHTS, quantized_of
from rewriter.target import Target

_TOLD: Mapping[ir.Node, str] = {}
_INT8_ACTIVATIONS = "rounds activations to 8 bits"


def cannot_run(nodes: Iterable[ir.Node], provider: str, layouts: Mapping[ir.Node, str] = _TOLD) -> str:
    """Returns why the installed runtime's provider cannot run the nodes, or runs them wrongly; empty where it can.

    The reference runs what its operators define, and raises at what they do not.

    Args:
        nodes: what is to run.
        provider: where.
        layouts: node -> the layout of its weights, where its metadata does not tell.
    """
    if provider == "reference":
        return ""
    return next((reason for node in nodes if (reason := _cannot_run(node, _target(provider), layouts.get(node)))), "")


def cannot_judge(nodes: Iterable[ir.Node], provider: str, layouts: Mapping[ir.Node, str] = _TOLD) -> str:
    """Returns why the provider's numbers prove nothing about the nodes; empty where they do; see ``cannot_run``."""
    if provider == "reference":
        return ""
    nodes = list(nodes)
    reason = cannot_run(nodes, provider, layouts)
    return reason or next((inexact for node in nodes if (inexact := _inexact(node, _target(provider)))), "")


def _target(provider: str) -> Target:
    return Target.parse("auto" if provider == "cpu" else provider)


def _cannot_run(node: ir.Node, target: Target, layout: str | None) -> str:
    if MATMUL_NBITS.computes(node) or GATHER_BLOCK_QUANTIZED.computes(node):
        reason = _linear(node, target) if MATMUL_NBITS.computes(node) else _lookup(node, target)
        return f"{node.op_type} on {target}: {reason}" if reason else ""
    operator = operator_of(node)
    if operator is None:
        return ""
    dtype = _dtype(node, 0)
    kernel = target.kernel(node.op_type)
    if kernel is None:
        return f"{target} has no {node.op_type}"
    router = node.inputs[1] if len(node.inputs) > 1 else None
    if router is not None and router.shape is not None and router.shape.rank() != 2:
        return f"{node.op_type} takes no router_probs of rank {router.shape.rank()}"
    weighted = operator is QMOE and input_at(node, ROUTER_WEIGHTS) is not None
    reason = kernel.refusal(form_of(node), _name(dtype), weighted=weighted)
    if reason is None and operator is QMOE:
        bits = set(quantized_of(node).bits[:2])
        layout = layout or node.metadata_props.get(LAYOUT_KEY, RAW.name)
        if layout not in target.qmoe_layouts:
            reason = f"the {layout} layout has no kernel"
        elif len(bits) > 1 and not kernel.mixed_bits:
            reason = f"projections of {' and '.join(map(str, sorted(bits)))} bits have no kernel"
    return "" if reason is None else f"{node.op_type} on {target}: {reason}"


def _linear(node: ir.Node, target: Target) -> str | None:
    own = matmul_nbits.attributes_of(node)
    if own.prepacked:
        return "it does not read a prepacked B"
    return target.linear.refusal(_name(_dtype(node, 0)), own.bits)


def _lookup(node: ir.Node, target: Target) -> str | None:
    data = node.inputs[0]
    if data is None or data.dtype != ir.DataType.UINT8 or data.shape is None or not isinstance(data.shape[-1], int):
        return None
    own = gather_block_quantized.attributes_of(node)
    zeros, scales = gather_block_quantized.ZERO_POINTS, gather_block_quantized.SCALES
    symmetric = len(node.inputs) <= zeros or node.inputs[zeros] is None
    k = data.shape[-1] * 8 // own.bits
    return target.lookup.refusal(_name(_dtype(node, scales)), k, own.bits, own.block, symmetric=symmetric)


def _dtype(node: ir.Node, index: int) -> ir.DataType | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None else value.dtype


def _name(dtype: ir.DataType | None) -> str:
    return dtype.name if dtype else "FLOAT"


def _inexact(node: ir.Node, target: Target) -> str:
    if MATMUL_NBITS.computes(node):
        level = matmul_nbits.attributes_of(node).accuracy_level
        return f"accuracy_level 4 {_INT8_ACTIVATIONS}" if level == 4 else ""
    if not QMOE.computes(node):
        return ""
    held = quantized_of(node)
    if any(target.rounds_activations(bits, held.block, held.accuracy_level) for bits in held.bits):
        return f"QMoE of {target} {_INT8_ACTIVATIONS} at {held.bits[0]} bits in blocks of {held.block}"
    return ""
