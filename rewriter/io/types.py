"""Types of values that an export left out, inferred by ONNX.

ONNX infers nothing of the operators of ONNX Runtime, nor of what follows from them: for the time of the inference
standard operators, whose outputs have the same type and shape, stand in for them.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from rewriter.graph.attributes import integer_attribute
from rewriter.graph.contents import all_nodes
from rewriter.io.sequences import untyped_sequences
from rewriter.operators.matmul_nbits import MATMUL_NBITS
from rewriter.operators.moe import MOE
from rewriter.operators.operator import DOMAIN
from rewriter.operators.qmoe import QMOE

_AS_FIRST_INPUT = {
    **dict.fromkeys((MOE.name, QMOE.name, "RotaryEmbedding", "SimplifiedLayerNormalization"), (0,)),
    **dict.fromkeys(("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"), (0, 3)),
}
"""Operator of ONNX Runtime -> its outputs that have the type and shape of its first input."""


def infer_types(model: ir.Model) -> None:
    """Gives values the type and shape that follow from the others, where any that is read lacks one.

    What is declared stays as it is, and what is a sequence or an optional has no tensor's type.

    Args:
        model: to be changed.
    """
    if not any(_lacks_type(value) for node in all_nodes(model) for value in node.inputs):
        return
    inferred = model.clone()
    twins = list(zip(_values(model), _values(inferred), strict=True))
    kept = {*untyped_sequences(model), *model.graph.outputs}
    known = _stand_in(inferred)
    with _quiet("onnx_ir.passes.common.shape_inference"):
        ShapeInferencePass(check_type=False, strict_mode=False)(inferred)  # strict, one operator in doubt ends it
    for value, twin in twins:
        node = value.producer()
        if twin not in known and node is not None and node.domain == DOMAIN:  # ONNX guesses, and is wrong of statistics
            continue
        if _lacks_type(value) and value not in kept:
            found = known.get(twin, twin)
            value.type, value.shape = value.type or found.type, value.shape or found.shape


def _stand_in(model: ir.Model) -> dict[ir.Value, ir.Value]:
    """Puts standard operators beside those of ONNX Runtime; returns what is read in place of their outputs."""
    read: dict[ir.Value, ir.Value] = {}
    for node in list(all_nodes(model)):
        for index in _AS_FIRST_INPUT.get(node.op_type, ()) if node.inputs else ():
            if index < len(node.outputs):
                read[node.outputs[index]] = _beside(node, ir.node("Identity", node.inputs[:1]))
        if MATMUL_NBITS.computes(node):
            size = [integer_attribute(node, name, 0) for name in "KN"]
            weight = ir.val(f"{node.outputs[0].name}__weight", ir.DataType.FLOAT, size)
            model.graph.inputs.append(weight)
            read[node.outputs[0]] = _beside(node, ir.node("MatMul", [node.inputs[0], weight]))
    for old, new in read.items():
        new.name, old.name = old.name, f"{old.name}__unknown"
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    return read


def _beside(node: ir.Node, stand_in: ir.Node) -> ir.Value:
    assert node.graph is not None
    node.graph.insert_after(node, stand_in)
    return stand_in.outputs[0]


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for node in all_nodes(model):
        yield from node.outputs


def _lacks_type(value: ir.Value | None) -> bool:
    return value is not None and (value.type is None or value.shape is None)


@contextlib.contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Inference that fails leaves the model as it was; the traceback that onnx-ir logs would reach the user."""
    log = logging.getLogger(logger)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
