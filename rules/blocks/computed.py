"""Operands that are static but computed: small integer arithmetic on constants, evaluated once by ONNX's own reference.

Fact stated: ``rewriter.tensors.View`` of the result.
Source: exports that were not optimized: Cast(Reshape(Identity(Constant))), Slice bounds from Concat or Add, Shape(w).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from rewriter.facts import Facts, Recogniser
from rewriter.rule import Declined
from rewriter.rules.blocks.guards import cast_type, integer_attribute
from rewriter.tensors import View

_LARGEST = 256
_OPERATORS = ("Add", "Sub", "Mul", "Div", "Mod", "Neg", "Concat", "Range", "Min", "Max", "Where", "Equal", "Cast")


class SmallInteger(Recogniser):
    """An operator whose inputs are all small constant integers."""

    def __init__(self, op_type: str) -> None:
        super().__init__(name=op_type)
        self._op_type = op_type

    def pattern(self, op: Any) -> Any:
        return getattr(op, self._op_type)(_allow_other_inputs=True, _outputs=["out"])

    def recognise(self, facts: Facts, *, out: ir.Value) -> View | None:
        node = out.producer()
        if node is None:
            return None
        arrays = []
        for value in node.inputs:
            view = facts.get(value, View)
            if view is None or view.size > _LARGEST or view.dtype.is_floating_point():
                return None
            arrays.append(np.asarray(view.numpy()))
        if self._op_type == "Cast":
            to = cast_type(node)
            if to is None or to.is_floating_point() or to == ir.DataType.STRING:
                return None
            return _view(arrays[0].astype(to.numpy()), out)
        try:
            return _view(_evaluate(node, arrays), out)
        except Exception as refused:  # the reference evaluator raises whatever NumPy does
            raise Declined(f"its operands do not fit: {refused}", node) from refused


class ConstantOfShape(Recogniser):
    """One integer in a small constant shape."""

    def pattern(self, op: Any, shape: Any) -> Any:
        return op.ConstantOfShape(shape, _outputs=["out"])

    def recognise(self, facts: Facts, *, shape: ir.Value, out: ir.Value) -> View | None:
        view, node = facts.get(shape, View), out.producer()
        value = None if node is None else node.attributes.get("value")
        if view is None or value is None or view.size > _LARGEST or not value.as_tensor().dtype.is_integer():
            return None
        extents = view.numpy().reshape(-1).tolist()
        if min(extents, default=1) < 0 or math.prod(extents) > _LARGEST:
            return None
        return _view(np.full(extents, value.as_tensor().numpy().reshape(-1)[0]), out)


class Shape(Recogniser):
    """The shape of a constant."""

    def pattern(self, op: Any, constant: Any) -> Any:
        return op.Shape(constant, _outputs=["out"])

    def recognise(self, facts: Facts, *, constant: ir.Value, out: ir.Value) -> View | None:
        view = facts.get(constant, View)
        node = out.producer()
        if view is None or node is None:
            return None
        start = integer_attribute(node, "start", 0)
        end = integer_attribute(node, "end", view.rank)
        return _view(np.array(view.shape[start:end], dtype=np.int64), out)


def _view(array: Any, out: ir.Value) -> View:
    return View.whole(ir.tensor(np.asarray(array), name=out.name), out.name or "")


def _evaluate(node: ir.Node, arrays: list[Any]) -> Any:
    names = [f"x{i}" for i in range(len(arrays))]
    attributes = [ir.to_proto(a) for a in node.attributes.values()]
    proto = onnx.helper.make_node(node.op_type, names, ["y"])
    proto.attribute.extend(attributes)
    graph = onnx.helper.make_graph(
        [proto],
        "operand",
        [
            onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in zip(names, arrays, strict=True)
        ],
        [onnx.ValueInfoProto(name="y")],
    )
    version = node.graph.opset_imports.get("", 21) if node.graph is not None else 21
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", version)])
    (result,) = ReferenceEvaluator(model).run(None, dict(zip(names, arrays, strict=True)))
    return result


RECOGNISERS: tuple[Recogniser, ...] = (*(SmallInteger(name) for name in _OPERATORS), ConstantOfShape(), Shape())
