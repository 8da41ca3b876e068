"""Models as ONNX text, and what the tests ask of them."""

from __future__ import annotations

from collections import Counter

import onnx
import onnx_ir as ir
from onnxscript.rewriter import RewriteRuleClassBase

from rewriter.parity.runtime import OrtRuntime


def parse(graph, *, opset=21, functions="", domains=""):
    """A model from the text of its graph; its values have types, those of functions have none."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}{domains}]>\n{graph}\n{functions}')
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def histogram(model):
    """Operator -> number of nodes, in the main graph, subgraphs and functions."""
    return Counter(node.op_type for body in (model.graph, *model.functions.values()) for node in body.all_nodes())


def snapshot(model):
    """The bytes of a model."""
    return ir.to_proto(model).SerializeToString(deterministic=True)


def names(model):
    """Every name that a value of the main graph has."""
    return [v.name for n in model.graph for v in n.outputs] + [*model.graph.initializers]


def run(model, feeds):
    """What ONNX Runtime computes; the checker must accept the model."""
    proto = model if isinstance(model, onnx.ModelProto) else ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return OrtRuntime().run(proto, feeds)


def rounds_activations(path):
    """Whether a model file asks for 8-bit activations, whose rounding differs from one kind of processor to another."""
    return any(a.name == "accuracy_level" and a.i == 4 for node in onnx.load(path).graph.node for a in node.attribute)


class Swap(RewriteRuleClassBase):
    """One operator for another, with the same inputs: right or wrong as the test needs it."""

    def __init__(self, old, new, *, name=None, domain="", **attributes):
        super().__init__(name=name or f"{old.lower()}-to-{new.lower()}")
        self._old, self._new, self._domain, self._attributes = old, new, domain, attributes

    def pattern(self, op, x):
        return getattr(op, self._old)(x, _allow_other_inputs=True)

    def rewrite(self, op, x):
        return getattr(op, self._new)(x, _domain=self._domain, **self._attributes)


class Drop(RewriteRuleClassBase):
    """Removes an operator of one input, as an Identity is."""

    def __init__(self, op_type="Identity"):
        super().__init__(name=f"drop-{op_type.lower()}")
        self._op_type = op_type

    def pattern(self, op, x):
        return getattr(op, self._op_type)(x)

    def rewrite(self, op, x):
        return x


class Constant(RewriteRuleClassBase):
    """Relu(x) -> Add(x, constant), for any constant."""

    def __init__(self, make, name="constant"):
        super().__init__(name=name)
        self._make = make

    def pattern(self, op, x):
        return op.Relu(x)

    def rewrite(self, op, x):
        return op.Add(x, op.initializer(self._make(), name="c"))
