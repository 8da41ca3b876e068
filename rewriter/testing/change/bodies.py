"""The bodies of a model (main graph, subgraphs, functions) and edits that must reach from one into those around it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.graph.contents import all_nodes, subgraphs

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """A fact of a model that can be changed.

    Attributes:
        what: the change, as messages show it.
        change: makes it, in the model in which the place was found.
    """

    what: str
    change: Callable[[], object] = field(repr=False)


@dataclass(frozen=True)
class Constant:
    """An initializer, or what a Constant node holds; a default that a caller may override is none.

    Attributes:
        value: the value that is constant.
        array: its contents.
        dtype: its element type.
    """

    value: ir.Value
    array: npt.NDArray[np.generic]
    dtype: ir.DataType

    @property
    def name(self) -> str:
        return self.value.name or ""

    def put(self, array: npt.NDArray[np.generic], dtype: ir.DataType | None = None) -> None:
        tensor = ir.tensor(np.asarray(array), dtype=dtype or self.dtype, name=self.name)
        node = self.value.producer()
        if node is None:
            self.value.const_value = tensor
        else:
            node.attributes.clear()
            node.attributes["value"] = ir.AttrTensor("value", tensor)
        self.value.type, self.value.shape = ir.TensorType(tensor.dtype), ir.Shape(np.shape(array))


class Bodies:
    """A model that is about to be changed.

    Attributes:
        model: the model.
        nodes: all nodes when the changes began.
        constants: all constants of numbers, likewise.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.nodes = list(all_nodes(model))
        self._holders = {graph: node for node in self.nodes for graph in subgraphs(node)}
        self._functions = {function.graph: function for function in model.functions.values()}
        self._names = {v.name for v in self._values()}
        self.constants = list(self._constants())

    def version(self, node: ir.Node) -> int:
        """Returns the version of the operator set that the node is of."""
        function = self._functions.get(self._root(_graph(node)))
        imports = self.model.opset_imports if function is None else function.opset_imports
        return imports.get(node.domain, 1)

    def fresh(self, stem: str) -> str:
        """Returns a name that no value has."""
        names = itertools.chain([stem], (f"{stem}_{i}" for i in itertools.count(1)))
        name = next(name for name in names if name not in self._names)
        self._names.add(name)
        return name

    def read(self, value: ir.Value, op_type: str, **attributes: int) -> ir.Value:
        """Adds a node that reads a value, in the value's own body; returns its output."""
        name = self.fresh(f"{value.name}_{op_type.lower()}")
        node = ir.node(op_type, [value], attributes, name=f"{name}_node")
        out = node.outputs[0]
        out.name, out.type = name, None if op_type == "Cast" else value.type
        graph, producer = _home(value), value.producer()
        if producer is not None:
            graph.insert_after(producer, node)
        elif len(graph):
            graph.insert_before(graph[0], node)
        return out

    def copy(self, constant: Constant) -> Constant:
        """Adds a constant of the same contents to the same body."""
        value = ir.Value(name=self.fresh(f"{constant.name}_copy"))
        producer = constant.value.producer()
        if producer is not None:
            node = ir.Node("", "Constant", [], outputs=[value], name=f"{value.name}_node")
            _graph(producer).insert_before(producer, node)
        added = Constant(value, constant.array, constant.dtype)
        added.put(constant.array)
        if producer is None:
            _home(constant.value).register_initializer(value)
        return added

    def expose(self, value: ir.Value) -> None:
        """Makes a value an output of its body, and through the bodies around it one of the model."""
        graph = _home(value)
        holder = self._holders.get(graph)
        if holder is not None:
            for other in subgraphs(holder):
                if other is not graph:  # both branches of an If have as many outputs
                    other.outputs.append(self.read(other.outputs[0], "Identity"))
            if value.type is None:  # in a function no type is known, and a subgraph's output needs one
                value.type = graph.outputs[-1].type
        graph.outputs.append(value)
        if holder is not None:
            self.expose(self._output(holder, len(holder.outputs), value))
        for caller in self._callers(graph):
            self.expose(self._output(caller, len(graph.outputs) - 1, value))

    def feed(self, constant: Constant, *, default: bool) -> None:
        """Makes a constant an input of the model, with its contents as default or with none."""
        value, graph = constant.value, _home(constant.value)
        producer = value.producer()
        if producer is None and graph is self.model.graph:
            graph.inputs.append(value)
            if not default:
                del graph.initializers[constant.name]
                value.const_value = None
            return
        fed = self._fed(graph, constant, default)
        value.replace_all_uses_with(fed)
        if producer is None:
            del graph.initializers[constant.name]
        else:
            graph.remove(producer)

    def _fed(self, graph: ir.Graph, constant: Constant, default: bool) -> ir.Value:
        """Adds an input for a constant to the root of a body, and to what is around that."""
        root = self._root(graph)
        value = ir.Value(
            name=self.fresh(f"{constant.name}_fed"),
            type=ir.TensorType(constant.dtype),
            shape=ir.Shape(constant.array.shape),
        )
        root.inputs.append(value)
        if root is self.model.graph and default:
            value.const_value = ir.tensor(constant.array, dtype=constant.dtype, name=value.name)
            root.register_initializer(value)
        for caller in self._callers(root):
            caller.resize_inputs(len(root.inputs))
            caller.replace_input_with(len(root.inputs) - 1, self._fed(_graph(caller), constant, default))
        return value

    def _output(self, node: ir.Node, index: int, inner: ir.Value) -> ir.Value:
        known = len(node.outputs)
        node.resize_outputs(max(known, index + 1))
        for out in node.outputs[known:]:
            out.name = self.fresh(f"{node.op_type.lower()}_more")
        node.outputs[index].type = inner.type
        return node.outputs[index]

    def _root(self, graph: ir.Graph) -> ir.Graph:
        while graph in self._holders:
            graph = _graph(self._holders[graph])
        return graph

    def _callers(self, graph: ir.Graph) -> list[ir.Node]:
        function = self._functions.get(graph)
        return [] if function is None else [n for n in self.nodes if n.op_identifier() == function.identifier()]

    def _values(self) -> Iterator[ir.Value]:
        for node in self.nodes:
            yield from node.outputs
        for graph in (self.model.graph, *self._functions, *self._holders):
            yield from graph.inputs
            yield from graph.initializers.values()

    def _constants(self) -> Iterator[Constant]:
        values = [v for v in self._values() if v.is_initializer() and not v.is_graph_input()]
        for value in [*values, *(n.outputs[0] for n in self.nodes if n.op_type == "Constant" and n.domain == "")]:
            tensor = ir.convenience.get_const_tensor(value)
            if tensor is not None and tensor.dtype != ir.DataType.STRING:
                yield Constant(value, tensor.numpy(), tensor.dtype)


def neighbours(items: Iterable[T], key: Callable[[T], Hashable]) -> Iterator[tuple[T, T]]:
    """Yields each item with the next of the same key."""
    before: dict[Hashable, T] = {}
    for item in items:
        if key(item) in before:
            yield before[key(item)], item
        before[key(item)] = item


def node_label(node: ir.Node) -> str:
    """Returns how messages name a node."""
    return f"{node.op_type} node '{node.name}'" if node.name else f"{node.op_type} node of '{node.outputs[0].name}'"


def _graph(node: ir.Node) -> ir.Graph:
    assert isinstance(node.graph, ir.Graph)
    return node.graph


def _home(value: ir.Value) -> ir.Graph:
    assert isinstance(value.graph, ir.Graph)
    return value.graph
