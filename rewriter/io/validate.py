"""Structural validity of a model: what no runtime could load, whatever the rest of it means.

onnx.checker also rejects models that run (exporters' own operators in the default domain, nodes out of order); this
check does not, and it knows the operators of com.microsoft that hold expert weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter

import onnx_ir as ir

from rewriter.errors import ModelError
from rewriter.graph.contents import Body, bodies, name_of, nodes_of, subgraphs
from rewriter.io.calls import require_bounded_calls
from rewriter.io.signatures import OperandCheck, Signature, operand_check, signature

_AGAIN = "export the model again"


def validate(model: ir.Model) -> list[Body]:
    """Checks that a model has what every runtime needs; changes nothing and reads no weight.

    Values are defined once, before their use (in some order of the nodes) and in a scope that reaches it; graph outputs
    exist; required inputs are there; attributes have their types; constant operands have a rank, shape and dtype that
    their operator can take.

    Returns:
        The bodies (main graph, functions) in which, or in a subgraph of which, a node comes before its inputs.

    Raises:
        ModelError: names the node or value and what is wrong with it.
    """
    require_bounded_calls(model)
    functions = {(domain, name): _NOTHING for domain, name, _ in model.functions}
    unsorted: list[Body] = []
    for body in bodies(model):
        label = f"function {body.domain}::{body.name}" if isinstance(body, ir.Function) else "the graph"
        scopes = _Scopes()
        for _, complaint in scopes.check(body, label):
            raise ModelError(complaint)
        if not scopes.in_order:
            unsorted.append(body)
        imports = model.opset_imports | body.opset_imports
        required: dict[tuple[str, str], tuple[Signature | None, OperandCheck | None]] = {**functions}
        for node in nodes_of(body):
            operator = domain, op_type = node.domain, node.op_type
            if operator not in required:
                required[operator] = signature(domain, op_type, imports.get(domain)), operand_check(domain, op_type)
            _check_node(node, *required[operator])
    return unsorted


def describe(node: ir.Node) -> str:
    """Returns how messages name a node: by its name, or its first output's, and its operator."""
    domain = f"{node.domain}::" if node.domain else ""
    return f"node '{name_of(node)}' ({domain}{node.op_type})"


class _Scopes:
    """A body of the model and the bodies within it: definitions and uses, in one walk.

    Attributes:
        in_order: each node that was seen comes after those whose outputs it, or a subgraph of it, reads.
    """

    def __init__(self) -> None:
        self.in_order = True
        self._visible: set[ir.Value] = set()

    def check(self, body: Body, label: str) -> list[tuple[ir.Value, str]]:
        """Returns the values that a body reads and neither defines nor sees, each with a complaint.

        A body around it may still define them, behind it.
        """
        visible = self._visible
        names: dict[str | ir.Value, ir.Value] = {}

        def define(values: Iterable[ir.Value], what: str | ir.Node) -> None:
            for value in values:
                key = value.name or value
                if key in names:
                    by = what if isinstance(what, str) else describe(what)
                    raise ModelError(f"{by} defines '{value.name}' in {label} a second time; {_AGAIN}")
                names[key] = value
                visible.add(value)

        define(body.inputs, "an input")
        for value in () if isinstance(body, ir.Function) else body.initializers.values():
            if not value.is_graph_input():
                define((value,), "an initializer")
                if value.const_value is None:
                    raise ModelError(f"initializer '{value.name}' of {label} has no data; {_AGAIN}")
        unknown: list[tuple[ir.Value, str]] = []
        for node in body:
            for read in node.inputs:
                if read is not None and read not in visible:
                    complaint = f"{describe(node)} reads '{read.name}', which nothing in its scope defines; {_AGAIN}"
                    unknown.append((read, complaint))
            for graph in subgraphs(node) if node.attributes.data else ():
                unknown += self.check(graph, f"a subgraph of {describe(node)}")
            define(node.outputs, node)
        for value in body.outputs:
            if value not in visible:
                unknown.append((value, f"output '{value.name}' of {label} is defined by no node; {_AGAIN}"))
        left = [(value, complaint) for value, complaint in unknown if value not in visible]
        if len(left) < len(unknown):
            self.in_order = False
            _check_acyclic(body, label)
        visible.difference_update(names.values())
        return left


def _check_acyclic(body: Body, label: str) -> None:
    here = set(body)
    order = TopologicalSorter({node: [p for p in _producers(node) if p in here] for node in body})
    try:
        order.prepare()
    except CycleError as error:
        cycle: list[ir.Node] = error.args[1]
        first = min(cycle, key=lambda node: node.name or "")
        raise ModelError(f"{describe(first)} of {label} reads, by way of others, its own output; {_AGAIN}") from error


def _producers(node: ir.Node) -> list[ir.Node]:
    """The nodes, of any scope, whose outputs ``node`` or a subgraph of it reads."""
    values = list(node.inputs)
    for graph in subgraphs(node):
        values.extend(graph.outputs)
        for inner in nodes_of(graph):
            values.extend(inner.inputs)
            values.extend(v for g in subgraphs(inner) for v in g.outputs)
    return [p for v in values if v is not None and (p := v.producer()) is not None]


_NOTHING = (None, None)
"""What is required of a call of the model's own function: its body says more than any signature."""


def _check_node(node: ir.Node, known: Signature | None, impossible: OperandCheck | None) -> None:
    arity = attributes = None
    if known is not None:
        arity, attributes = _arity(node, known), _attributes(node, known)
    operands = None if impossible is None else impossible(node)
    if arity or attributes or operands:
        raise ModelError(f"{describe(node)}: {'; '.join(filter(None, (arity, attributes, operands)))}; {_AGAIN}")


def _arity(node: ir.Node, known: Signature) -> str | None:
    inputs = node.inputs
    given = len(inputs)
    if given <= known.most and None not in inputs and (not known.required or known.required[-1] < given):
        return None
    while given and inputs[given - 1] is None:
        given -= 1
    if given > known.most:
        return f"it has {given} inputs, and its operator takes {known.most} at most"
    for index in known.required:
        if index >= given or inputs[index] is None:
            return f"required input {index} ({known.names[index]}) is missing"
    return None


def _attributes(node: ir.Node, known: Signature) -> str | None:
    for name, attribute in node.attributes.data.items():
        wanted = known.attributes.get(name)
        if wanted is not None and attribute.type != wanted and not attribute.is_ref():
            return f"attribute {name} is of type {attribute.type.name}, and its operator takes {wanted.name}"
    return None
