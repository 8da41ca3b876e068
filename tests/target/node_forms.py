"""Nodes that were written, in the terms of the prober."""

from __future__ import annotations

import onnx_ir as ir
from probe.forms import Form, LinearForm, LookupForm, MoEForm, QMoEForm

from rewriter.operators import gather_block_quantized, matmul_nbits
from rewriter.operators.form import form_of, operator_of
from rewriter.operators.operator import input_at
from rewriter.operators.qmoe import LAYOUT_KEY, ROUTER_WEIGHTS, quantized_of


def of_node(node: ir.Node) -> Form:
    """Returns the form of a node that was written, in the prober's terms."""
    if node.op_type == "MatMulNBits":
        return _linear(node)
    return _lookup(node) if node.op_type == "GatherBlockQuantized" else _experts(node)


def _linear(node: ir.Node) -> LinearForm:
    own = matmul_nbits.attributes_of(node)
    assert own.layout is not None
    return LinearForm(
        x=_type(node, 2),
        bits=own.bits,
        block=own.block,
        zeros="none" if input_at(node, 3) is None else "packed",
        bias=input_at(node, matmul_nbits.BIAS) is not None,
        layout=own.layout.name.removeprefix("cutlass-"),
        level=own.accuracy_level,
        n=own.n,
        k=own.k,
    )


def _lookup(node: ir.Node) -> LookupForm:
    own, shape = gather_block_quantized.attributes_of(node), _shape(node, 0)
    zeros = "none" if input_at(node, 3) is None else "packed"
    return LookupForm(_type(node, 2), own.bits, own.block, zeros, len(shape), shape[-1] * 8 // own.bits)


def _experts(node: ir.Node) -> MoEForm:
    own, operator, x = form_of(node), operator_of(node), node.inputs[0]
    assert operator is not None and x is not None and x.dtype is not None and x.shape is not None
    slots = operator.projections[: 3 if own.gated else 2]
    biases = {input_at(node, slot.bias) is not None for slot in slots}
    assert len(biases) == 1, "the sweep has biases everywhere or nowhere"
    n1, n2 = (_shape(node, slot.weight if slot.scales is None else slot.scales)[1] for slot in slots[:2])
    swiglu = own.activation == "swiglu"
    shared = {
        "x": x.dtype.name,
        "act": own.activation,
        "fusion": own.fusion,
        "fc3": own.gated,
        "constants": f"{own.alpha:g},{own.beta:g},{own.limit:g}" if swiglu else MoEForm.constants,
        "bias": "all" if biases.pop() else "none",
        "normalize": own.normalize,
        "sparse": own.sparse_mixer,
        "top": own.k,
        "rank": len(x.shape),
        "h": n2,
        "i": n1 // own.fused,
    }
    return QMoEForm(**shared, **_codes(node)) if operator.quantized else MoEForm(**shared)


def _codes(node: ir.Node) -> dict[str, object]:
    held = quantized_of(node)
    layout = node.metadata_props[LAYOUT_KEY].removeprefix("cutlass-")
    attribute = node.attributes.get("weights_prepacked")
    told = "auto" if attribute is None else str(attribute.as_int())
    expected = held.format == "int" and told == str(int(layout != "raw"))
    zeros = {(False, False): "none", (True, True): "all", (True, False): "fc1", (False, True): "fc2"}
    return {
        "bits": held.bits[:2],
        "block": {"mxfp4": 32, "nvfp4": 16}.get(held.format or "", held.block),
        "zeros": zeros[held.zero_points[:2]],
        "layout": layout,
        "prepacked": "auto" if expected else told,
        "weights": input_at(node, ROUTER_WEIGHTS) is not None,
        "level": held.accuracy_level,
        "quant": held.format,
    }


def _type(node: ir.Node, slot: int) -> str:
    value = input_at(node, slot)
    while value is not None and value.dtype is None and value.producer() is not None:
        value = input_at(value.producer(), 0)  # scales that are reshaped in the graph
    assert value is not None and value.dtype is not None
    return value.dtype.name


def _shape(node: ir.Node, slot: int) -> tuple[int, ...]:
    value = input_at(node, slot)
    assert value is not None
    if value.shape is not None:
        return tuple(map(int, value.shape.numpy()))
    wanted = input_at(value.producer(), 1)  # a table that is reshaped in the graph
    assert wanted is not None and wanted.const_value is not None
    return tuple(map(int, wanted.const_value.numpy()))
