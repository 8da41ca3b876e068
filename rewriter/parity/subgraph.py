"""A side of a rewrite as a model of its own: the matched subgraph, or its replacement."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from rewriter.facts import Facts
from rewriter.graph.attributes import cast_type
from rewriter.graph.contents import serialized
from rewriter.operators.qmoe import LAYOUT_KEY
from rewriter.parity.subgraph_inputs import Feeds
from rewriter.parity.weights import fed_weights, some_experts, stacks_of
from rewriter.tensors import View, ViewTensor

Array = npt.NDArray[Any]

_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_SMALL = 4096
"""Elements of a constant that is cast before it is run."""


class Subgraph:
    """The nodes that compute some values from constants and from values that can be fed.

    Attributes:
        nodes: in topological order.
        constants: leaves that are constants.
        fed: leaves that are not, in the order in which they are met.
        experts: which experts of a stack are run, or None for all.
    """

    def __init__(
        self,
        names: dict[ir.Value, str],
        outputs: Sequence[ir.Value],
        inside: set[ir.Node],
        facts: Facts,
        imports: Mapping[str, int],
        instead: Mapping[ir.Value, ir.Value] | None = None,
        layouts: Mapping[ir.Node, str] | None = None,
    ) -> None:
        self._names = names
        self._instead = instead or {}
        self._imports = imports
        self._layouts = layouts or {}
        self._outputs = outputs
        self.nodes: list[ir.Node] = []
        self.constants: dict[ir.Value, ir.TensorProtocol] = {}
        self.fed: list[ir.Value] = []
        self.experts: range | None = None
        done: set[ir.Node] = set()
        stack: list[tuple[ir.Value, bool]] = [(value, False) for value in reversed(outputs)]
        while stack:
            value, expanded = stack.pop()
            value = self._instead.get(value, value)
            names.setdefault(value, f"v{len(names)}")
            producer = value.producer()
            if producer is not None and producer.op_type == "Constant" and (view := facts.get(value, View)) is not None:
                self.constants[value] = ViewTensor(view)
            elif producer is not None and (producer in inside or _is_static(value, producer, facts)):
                if producer in done:
                    continue
                if expanded or not producer.inputs:
                    done.add(producer)
                    self.nodes.append(producer)
                    continue
                stack.append((value, True))
                stack.extend((v, False) for v in producer.inputs if v is not None)
            elif value.const_value is not None and not value.is_graph_input():
                self.constants[value] = value.const_value
            elif value not in self.fed:
                self.fed.append(value)

    def model(
        self, replaced: Mapping[ir.Value, Array], many: Sequence[Feeds]
    ) -> tuple[onnx.ModelProto, Sequence[Feeds]]:
        """Returns the subgraph as a model, and what it is fed in each run.

        Constants are initializers, but for large weights: a model holds a copy of each, a runtime makes more of them.

        Args:
            replaced: constants with other contents.
            many: the inputs of each run, which both sides share.
        """
        cast = {node: array for node in self.nodes if (array := self._cast(node, replaced)) is not None}
        nodes = [self._node(node) for node in self.nodes if node not in cast]
        by_reference = fed_weights(self)
        own = [{self._names[value]: feeds[self._names[value]] for value in self.fed} for feeds in many]
        domains = {"": 21} | {node.domain: 1 for node in self.nodes if node.domain}
        domains |= {d: v for d, v in self._imports.items() if d in domains}
        model = onnx.ModelProto(
            ir_version=10, opset_import=[onnx.helper.make_opsetid(d, v) for d, v in domains.items()]
        )
        for value, array in self._arrays(replaced):
            if value in by_reference:
                for feeds in own:
                    feeds[self._names[value]] = array
            else:
                _store(model, self._names[value], array)
        for node, array in cast.items():
            _store(model, self._names[node.outputs[0]], array)
        inputs = [_input(name, [feeds[name] for feeds in own]) for name in own[0]]
        outputs = [_output(self._names[v], v) for v in self._outputs]
        model.graph.MergeFrom(onnx.helper.make_graph(nodes, "local", inputs, outputs))  # which would copy weights
        return model, own

    def _cast(self, node: ir.Node, replaced: Mapping[ir.Value, Array]) -> Array | None:
        """A small constant in another float type: a runtime may leave a cast to halves out, and round nothing."""
        value, to = node.inputs[0] if node.inputs else None, cast_type(node) if node.op_type == "Cast" else None
        if value is None or to is None or value in replaced or value not in self.constants:
            return None
        tensor = self.constants[value]
        floats = tensor.dtype.is_floating_point() and to in _FLOATS
        return np.asarray(tensor.numpy()).astype(to.numpy()) if floats and tensor.size <= _SMALL else None

    def _arrays(self, replaced: Mapping[ir.Value, Array]) -> Iterator[tuple[ir.Value, Array]]:
        stacks = set() if self.experts is None else stacks_of(self)
        for value, tensor in self.constants.items():
            if value in replaced:
                yield value, replaced[value]
            elif self.experts is not None and value in stacks:
                yield value, some_experts(tensor, self.experts)
            else:
                yield value, np.asarray(tensor.numpy())

    def _node(self, node: ir.Node) -> onnx.NodeProto:
        inputs = ["" if v is None else self._names[self._instead.get(v, v)] for v in node.inputs]
        for out in node.outputs:
            self._names.setdefault(out, f"v{len(self._names)}")
        outputs = [self._names[v] for v in node.outputs]
        proto = onnx.NodeProto(op_type=node.op_type, input=inputs, output=outputs, domain=node.domain)
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.INT:  # most are; a message of any other kind takes ten times as long
                kind = onnx.AttributeProto.INT
                proto.attribute.append(onnx.AttributeProto(name=attribute.name, type=kind, i=attribute.value))
            else:
                proto.attribute.append(serialized(attribute))
        layout = {LAYOUT_KEY: self._layouts[node]} if node in self._layouts else {}
        for key, text in {**node.metadata_props, **layout}.items():
            proto.metadata_props.add(key=key, value=text)
        return proto


def _is_static(value: ir.Value, producer: ir.Node, facts: Facts) -> bool:
    """Whether the value is a view of a constant, or a sequence of such views: what no feed may take the place of."""
    if facts.get(value, View) is not None:
        return True
    return producer.op_type == "SplitToSequence" and facts.get(producer.inputs[0], View) is not None


def _store(model: onnx.ModelProto, name: str, array: Array) -> None:
    model.graph.initializer.add().CopyFrom(onnx.numpy_helper.from_array(np.asarray(array, order="C"), name))


def _input(name: str, arrays: Sequence[Array]) -> onnx.ValueInfoProto:
    """Declares an input; dimensions in which its arrays differ have no size."""
    shape = [sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*(a.shape for a in arrays), strict=True)]
    return onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(arrays[0].dtype), shape)


def _output(name: str, value: ir.Value) -> onnx.ValueInfoProto:
    if value.dtype is None:
        return onnx.ValueInfoProto(name=name)
    return onnx.helper.make_tensor_value_info(name, value.dtype.value, None)
