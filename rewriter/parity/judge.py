"""Whether a runtime's own numbers can prove a rewrite, or only the reference operators' can."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import onnx_ir as ir

from rewriter.operators import gather_block_quantized, matmul_nbits
from rewriter.operators.form import form_of, operator_of
from rewriter.operators.gather_block_quantized import GATHER_BLOCK_QUANTIZED
from rewriter.operators.matmul_nbits import MATMUL_NBITS
from rewriter.operators.operator import input_at
from rewriter.operators.qmoe import LAYOUT_KEY, QMOE, RAW, ROUTER_WEIGHTS, quantized_of
from rewriter.quantize.formats import FORMATS, INT
from rewriter.quantize.types import QuantizedShape
from rewriter.target import Kernel, Target

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


def unfit(nodes: Iterable[ir.Node], target: Target) -> Iterator[tuple[ir.Node, str]]:
    """Yields the nodes that a target refuses or computes wrongly, and why, as far as its tables know.

    Where nothing tells the layout of a QMoE's weights, it is not asked for.
    """
    for node in nodes:
        if QMOE.computes(node) and LAYOUT_KEY not in node.metadata_props:
            weighted = input_at(node, ROUTER_WEIGHTS) is not None
            kernels = target.runs(QMOE.name, form_of(node), _name(_dtype(node, 0)), weighted=weighted)
            reason = f"{node.op_type} on {target}: {kernels}" if isinstance(kernels, str) else ""
        else:
            reason = _cannot_run(node, target, None)
        if reason:
            yield node, reason


def cannot_judge(nodes: Iterable[ir.Node], provider: str, layouts: Mapping[ir.Node, str] = _TOLD) -> str:
    """Returns why the provider's numbers cannot prove anything about the nodes; empty where they can."""
    if provider == "reference":
        return ""
    nodes = list(nodes)
    reason = cannot_run(nodes, provider, layouts)
    return reason or next(
        (inexact for node in nodes if (inexact := _inexact(node, _target(provider), layouts.get(node)))), ""
    )


def _target(provider: str) -> Target:
    return Target.parse("auto" if provider == "cpu" else provider)


def _cannot_run(node: ir.Node, target: Target, layout: str | None) -> str:
    if MATMUL_NBITS.computes(node) or GATHER_BLOCK_QUANTIZED.computes(node):
        reason = _linear(node, target) if MATMUL_NBITS.computes(node) else _lookup(node, target)
        return f"{node.op_type} on {target}: {reason}" if reason else ""
    if operator_of(node) is None:
        return ""
    router = node.inputs[1] if len(node.inputs) > 1 else None
    if router is not None and router.shape is not None and router.shape.rank() != 2:
        return f"{node.op_type} takes no router_probs of rank {router.shape.rank()}"
    kernels = _kernels(node, target, layout)
    return f"{node.op_type} on {target}: {kernels}" if isinstance(kernels, str) else ""


def _kernels(node: ir.Node, target: Target, layout: str | None) -> Sequence[Kernel] | str:
    """The target's kernels that run an MoE or QMoE, or why none does."""
    quantized = QMOE.computes(node)
    weighted = quantized and input_at(node, ROUTER_WEIGHTS) is not None
    kernels = target.runs(node.op_type, form_of(node), _name(_dtype(node, 0)), weighted=weighted)
    shapes = _shapes(node) if quantized else None
    if isinstance(kernels, str) or shapes is None:
        return kernels
    layout = layout or node.metadata_props.get(LAYOUT_KEY, RAW.name)
    reasons = [kernel.cannot_hold(shapes, layout) for kernel in kernels]
    return [own for own, reason in zip(kernels, reasons, strict=True) if reason is None] or str(reasons[0])


def _shapes(node: ir.Node) -> list[QuantizedShape] | None:
    """How the projections of a QMoE are quantized, or None where the shapes of their scales are unknown."""
    held, slots = quantized_of(node), QMOE.projections
    scales = [input_at(node, own.scales) for own in slots[:2]]
    shapes = [value.shape for value in scales if value is not None and value.shape is not None]
    if len(shapes) < 2 or not all(shape.is_static() and shape.rank() > 1 for shape in shapes):
        return None
    wide, hidden = (int(shape.numpy()[1]) for shape in shapes)
    inter = wide // form_of(node).fused
    sizes = ((wide, hidden), (hidden, inter), (inter, hidden))
    count = 2 if input_at(node, slots[2].weight) is None else 3
    own = FORMATS[held.format or INT.name]
    block = own.block or held.block
    return [QuantizedShape(*sizes[i], held.bits[i], block, not held.zero_points[i], own.name) for i in range(count)]


def _linear(node: ir.Node, target: Target) -> str | None:
    own = matmul_nbits.attributes_of(node)
    layout = matmul_nbits.LAYOUTS[own.prepacked].name if own.prepacked in range(len(matmul_nbits.LAYOUTS)) else "?"
    symmetric = input_at(node, matmul_nbits.PARTS[2]) is None
    return target.linear.refusal(_name(_dtype(node, 0)), own.bits, own.block, symmetric=symmetric, layout=layout)


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


def _inexact(node: ir.Node, target: Target, layout: str | None) -> str:
    if MATMUL_NBITS.computes(node):
        level = matmul_nbits.attributes_of(node).accuracy_level
        return f"accuracy_level 4 {_INT8_ACTIVATIONS}" if level == 4 else ""
    if not QMOE.computes(node):
        return ""
    held, kernels = quantized_of(node), _kernels(node, target, layout)
    level = held.accuracy_level
    if isinstance(kernels, str):
        return ""
    if any(kernels[0].rounds_activations(b, held.block, level) for b in held.bits):
        return f"QMoE of {target} {_INT8_ACTIVATIONS} at {held.bits[0]} bits in blocks of {held.block}"
    return "" if kernels[0].judges else f"QMoE of {target} rounds {held.format} more than a proof allows"
