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
from rewriter.io.signatures import Signature, check_operands, signature

_AGAIN = "export the model again"


def validate(model: ir.Model) -> list[Body]:
    """Holds a model to what every runtime needs; changes nothing and reads no weight.

    Values are defined once, before their use (in some order of the nodes) and in a scope that reaches it; graph outputs
    exist; required inputs are there; attributes have their types; constant operands have a rank, shape and dtype that
    their operator can take.

    Returns:
        The bodies (main graph, functions) in which, or in a subgraph of which, a node comes before its inputs.

    Raises:
        ModelError: names the node or value and what is wrong with it.
    """
    require_bounded_calls(model)
    functions = {(domain, name) for domain, name, _ in model.functions}
    unsorted: list[Body] = []
    for body in bodies(model):
        label = f"function {body.domain}::{body.name}" if isinstance(body, ir.Function) else "the graph"
        if not _check_scope(body, label, set()):
            unsorted.append(body)
        imports = model.opset_imports | body.opset_imports
        for node in nodes_of(body):
            if (node.domain, node.op_type) not in functions:
                _check_node(node, imports)
    return unsorted


def is_sorted(body: Body) -> bool:
    """True where each node of ``body`` comes after those whose outputs it, or a subgraph of it, reads."""
    position = {node: index for index, node in enumerate(body)}
    return all(position.get(p, -1) < index for node, index in position.items() for p in _producers(node))


def describe(node: ir.Node) -> str:
    """Returns how messages name a node: by its name, or its first output's, and its operator."""
    domain = f"{node.domain}::" if node.domain else ""
    return f"node '{name_of(node)}' ({domain}{node.op_type})"


def _check_scope(body: Body, label: str, visible: set[ir.Value]) -> bool:
    """Checks definitions and uses in ``body``; ``visible`` holds the values of the enclosing scopes.

    Returns whether each node, in its subgraphs too, comes after those whose outputs it reads.
    """
    initializers = [] if isinstance(body, ir.Function) else list(body.initializers.values())
    overridable = set(body.inputs)
    local: set[ir.Value] = set()
    names: dict[str, ir.Value] = {}

    def define(values: Iterable[ir.Value], what: str | ir.Node) -> None:
        for value in values:
            if value in local or (value.name and names.setdefault(value.name, value) is not value):
                by = what if isinstance(what, str) else describe(what)
                raise ModelError(f"{by} defines '{value.name}' in {label} a second time; {_AGAIN}")
            local.add(value)

    define(body.inputs, "an input")
    define((v for v in initializers if v not in overridable), "an initializer")
    for value in initializers:
        if value.const_value is None and value not in overridable:
            raise ModelError(f"initializer '{value.name}' of {label} has no data; {_AGAIN}")
    for node in body:
        define(node.outputs, node)
    visible |= local
    in_order = is_sorted(body)
    if not in_order:
        _check_acyclic(body, label)
    for node in body:
        for read in node.inputs:
            if read is not None and read not in visible:
                raise ModelError(f"{describe(node)} reads '{read.name}', which nothing in its scope defines; {_AGAIN}")
        for graph in subgraphs(node):
            in_order &= _check_scope(graph, f"a subgraph of {describe(node)}", visible)
    for value in body.outputs:
        if value not in visible:
            raise ModelError(f"output '{value.name}' of {label} is defined by no node; {_AGAIN}")
    visible -= local
    return in_order


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


def _check_node(node: ir.Node, imports: dict[str, int]) -> None:
    problem = check_operands(node)
    known = signature(node.domain, node.op_type, imports.get(node.domain))
    problems = [_arity(node, known), _attributes(node, known)] if known is not None else []
    if found := "; ".join(filter(None, (*problems, problem))):
        raise ModelError(f"{describe(node)}: {found}; {_AGAIN}")


def _arity(node: ir.Node, known: Signature) -> str | None:
    given = len(node.inputs)
    while given and node.inputs[given - 1] is None:
        given -= 1
    if given > known.most:
        return f"it has {given} inputs, and its operator takes {known.most} at most"
    for index in known.required:
        if index >= given or node.inputs[index] is None:
            return f"required input {index} ({known.names[index]}) is missing"
    return None


def _attributes(node: ir.Node, known: Signature) -> str | None:
    for name, attribute in node.attributes.data.items():
        wanted = known.attributes.get(name)
        if wanted is not None and attribute.type != wanted and not attribute.is_ref():
            return f"attribute {name} is of type {attribute.type.name}, and its operator takes {wanted.name}"
    return None
