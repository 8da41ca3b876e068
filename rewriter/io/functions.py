"""Calls of model-local functions through which weights are read are inlined, as runtimes do when they load a model.

A rewrite in a function's body would change all its calls alike, and nothing there has a type. Functions of the domains
that runtimes know stay: they stand in for kernels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from rewriter.graph.contents import all_nodes, bodies, stored_tensors
from rewriter.graph.walk import walk
from rewriter.io.calls import instances

_KNOWN = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
_MOVES = frozenset({"Cast", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"})
_MOST = 10**8
"""Nodes of functions, each times the square of its calls: inlining looks for free names one by one."""
_SMALL = 4096
"""Bytes of a matrix that may stay float."""


def inline_functions(model: ir.Model) -> None:
    """Inlines the functions that hold a matrix of floats or are given one, with those that call them.

    All stay where that cannot be done: where their operators mean something else in the opset of the model, where they
    are given graphs, or are called too often.

    Args:
        model: to be changed; no function calls itself.
    """
    wanted = _weighed(model) if model.functions else set()
    if wanted and _can_be_inlined(model, wanted):
        for identity in wanted:  # the pass asks for equal imports
            imports = model.functions[identity].opset_imports
            imports.update({domain: model.opset_imports.setdefault(domain, own) for domain, own in imports.items()})
        InlinePass(lambda function: function.identifier() in wanted)(model)
        _share_constants(model)


def _weighed(model: ir.Model) -> set[ir.OperatorIdentifier]:
    body_of = {node: body for body in bodies(model) for node in ir.traversal.RecursiveGraphIterator(body)}
    calls = {node: function for node in body_of if (function := model.functions.get(node.op_identifier())) is not None}
    found: list[ir.Function] = []
    weights: list[ir.Value] = []
    for slot in stored_tensors(model):
        if not slot.tensor.dtype.is_floating_point() or len(slot.tensor.shape) < 2 or slot.tensor.nbytes <= _SMALL:
            continue
        if isinstance(slot.owner, ir.Value):
            weights.append(slot.owner)
            continue
        weights.extend(slot.owner.outputs)
        found.extend(f for f in (calls.get(slot.owner), body_of[slot.owner]) if isinstance(f, ir.Function))

    def shown(value: ir.Value) -> list[ir.Value]:
        further: list[ir.Value] = []
        for node, index in value.uses():
            if node in calls:
                found.append(calls[node])
                further += calls[node].inputs[index : index + 1]
            elif node.op_type in _MOVES and not node.domain and not index:
                further += node.outputs
        return further

    for _ in walk(weights, shown, limit=None):
        pass

    def callers(function: ir.Function) -> Iterator[ir.Function]:
        holders = (body_of[node] for node, called in calls.items() if called is function)
        return (body for body in holders if isinstance(body, ir.Function) and body.domain not in _KNOWN)

    start = [function for function in found if function.domain not in _KNOWN]
    return {function.identifier() for function in walk(start, callers, limit=None)}


def _can_be_inlined(model: ir.Model, wanted: set[ir.OperatorIdentifier]) -> bool:
    functions = [model.functions[identity] for identity in wanted]
    if any(operators_of_another_opset(model, function) for function in functions):
        return False
    often = instances(model)
    if sum(len(function) * often[function.identifier()] ** 2 for function in functions) > _MOST:
        return False
    graphs = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return not any(
        len(node.inputs) > len(model.functions[identity].inputs)
        or any(attribute.type in graphs for attribute in node.attributes.values())
        for node in all_nodes(model)
        if (identity := node.op_identifier()) in wanted
    )


def operators_of_another_opset(model: ir.Model, function: ir.Function) -> list[str]:
    """Returns the operators of a function that mean something else in the opset which the model imports."""
    found: dict[str, None] = {}
    for node in ir.traversal.RecursiveGraphIterator(function):
        own, there = (body.opset_imports.get(node.domain) for body in (function, model))
        if own is not None and there is not None and own != there and _since(node, own) != _since(node, there):
            found[node.op_type] = None
    return list(found)


def _since(node: ir.Node, version: int) -> int:
    """The version in which an operator was last changed; the version itself where ONNX does not know the operator."""
    if not onnx.defs.has(node.op_type, domain=node.domain):
        return version
    try:
        return int(onnx.defs.get_schema(node.op_type, version, node.domain).since_version)
    except onnx.defs.SchemaError:
        return version


def _share_constants(model: ir.Model) -> None:
    """Makes one initializer of a constant of a function that was called more than once."""
    slots = [s for s in stored_tensors(model) if isinstance(s.owner, ir.Node) and s.owner.op_type == "Constant"]
    copies = Counter(id(slot.tensor) for slot in slots)
    homes: dict[int, ir.Value] = {}
    for slot in slots:
        node = slot.owner
        assert isinstance(node, ir.Node)
        (out,) = node.outputs
        if copies[id(slot.tensor)] == 1 or out.is_graph_output() or node.graph is None:
            continue
        home = homes.get(id(slot.tensor))
        if home is None:
            home = homes[id(slot.tensor)] = ir.val(out.name, const_value=slot.tensor)
            out.name = f"{out.name}__constant"
            model.graph.register_initializer(home)
        out.replace_all_uses_with(home)
        node.graph.remove(node, safe=True)
