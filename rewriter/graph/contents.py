"""What a model holds: its tensors, nodes and subgraphs, wherever they stand."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import onnx
import onnx_ir as ir

Body = ir.Graph | ir.Function
Undo = Callable[[], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Slot:
    """A place in a model that holds a tensor.

    Attributes:
        owner: the value of an initializer, or the node of an attribute.
        key: name of the initializer or attribute.
        tensor: what was there when the slot was found.
    """

    owner: ir.Value | ir.Node
    key: str
    tensor: ir.TensorProtocol

    @property
    def label(self) -> str:
        """How messages name the slot."""
        if isinstance(self.owner, ir.Value):
            return f"initializer '{self.key}'"
        return f"attribute '{self.key}' of node '{name_of(self.owner)}' ({self.owner.op_type})"

    def put(self, tensor: ir.TensorProtocol) -> Undo:
        """Puts another tensor there; returns what puts the old one back."""
        owner = self.owner
        if isinstance(owner, ir.Value):
            before = owner.const_value
            owner.const_value = tensor
            return lambda: setattr(owner, "const_value", before)
        attribute = owner.attributes[self.key]
        owner.attributes[self.key] = ir.AttrTensor(self.key, tensor, doc_string=attribute.doc_string)
        return lambda: owner.attributes.update({self.key: attribute})


def is_random(node: ir.Node) -> bool:
    """Whether a node gives other numbers each time that it runs; a Dropout does where it trains."""
    if node.op_type == "Dropout":
        trains = node.inputs[2] if len(node.inputs) > 2 else None
        told = None if trains is None else trains.const_value
        return trains is not None and (told is None or bool(told.numpy()))
    return node.op_type.startswith(("Random", "Multinomial", "Bernoulli"))


def stored_tensors(model: ir.Model) -> Iterator[Slot]:
    """Yields every tensor that the model holds, in the order of the model.

    Initializers of the main graph and of every subgraph come first, then tensor attributes, functions included.
    """
    held = [(node, tuple(node.attributes.data.values())) for node in all_nodes(model) if node.attributes.data]
    for graph in (model.graph, *(graph for node, _ in held for graph in subgraphs(node))):
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                yield Slot(value, name, value.const_value)
    for node, attributes in held:
        for attribute in attributes:
            if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                yield Slot(node, attribute.name, attribute.value)


def serialized(attribute: ir.Attr) -> onnx.AttributeProto:
    """Returns an attribute as a message; ``ir.to_proto`` first asks whether it is one of seven other things, slowly."""
    if attribute.is_ref():
        return ir.serde.serialize_reference_attribute(attribute)
    return ir.serde.serialize_attribute(attribute)


def total_bytes(model: ir.Model) -> int:
    """Returns the bytes of all stored tensors, as they will be written."""
    return sum(slot.tensor.nbytes for slot in stored_tensors(model))


def integer(node: ir.Node, name: str, default: int) -> int:
    """Returns an integer attribute; the default where it is absent, or given by a function's caller.

    Raises:
        TypeError: it is of another type.
    """
    attribute = node.attributes.data.get(name)
    return default if attribute is None or attribute.is_ref() else attribute.as_int()


def number(node: ir.Node, name: str, default: float) -> float:
    """Returns a float attribute; the default where it is absent, or given by a function's caller."""
    attribute = node.attributes.data.get(name)
    return default if attribute is None or attribute.is_ref() else attribute.as_float()


def text(node: ir.Node, name: str, default: str) -> str:
    """Returns a text attribute; the default where it is absent, or given by a function's caller."""
    attribute = node.attributes.data.get(name)
    return default if attribute is None or attribute.is_ref() else attribute.as_string()


def name_of(node: ir.Node) -> str:
    """Returns the node's name; where it has none, that of its first output, or its operator."""
    return node.name or next((value.name for value in node.outputs if value.name), node.op_type)


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Yields the nodes of the main graph, of functions, and of all their subgraphs."""
    for body in bodies(model):
        yield from nodes_of(body)


def nodes_of(body: Body) -> Iterator[ir.Node]:
    """Yields the nodes of a body and of its subgraphs, as onnx-ir's own traversal, in a third of the time."""
    for node in body:
        yield node
        if node.attributes.data:
            for graph in subgraphs(node):
                yield from nodes_of(graph)


def bodies(model: ir.Model) -> tuple[Body, ...]:
    """Returns the main graph and the functions."""
    return (model.graph, *model.functions.values())


def subgraphs(node: ir.Node) -> list[ir.Graph]:
    """Returns the bodies that the node holds (of If, Loop, Scan ...)."""
    found: list[ir.Graph] = []
    for attribute in node.attributes.data.values():
        if attribute.type in _GRAPHS and not attribute.is_ref():
            found.extend([attribute.value] if attribute.type == ir.AttributeType.GRAPH else attribute.value)
    return found


_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


@contextlib.contextmanager
def swapped() -> Iterator[Callable[[Slot, ir.TensorProtocol], None]]:
    """Gives a function that puts a tensor into a slot of a model; all slots are as they were after the block."""
    with contextlib.ExitStack() as undo:

        def swap(slot: Slot, tensor: ir.TensorProtocol) -> None:
            undo.callback(slot.put(tensor))

        yield swap
