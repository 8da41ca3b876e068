"""Finds values that are sequences or optionals: they must not be given a tensor's type."""

from __future__ import annotations

import onnx_ir as ir

from rewriter.graph.contents import all_nodes, subgraphs

_MAKE = frozenset(
    {
        "Optional",
        "SequenceConstruct",
        "SequenceEmpty",
        "SequenceErase",
        "SequenceInsert",
        "SequenceMap",
        "SplitToSequence",
    }
)
_PASS_ON = frozenset({"Identity", "If", "Loop", "Scan"})


def untyped_sequences(model: ir.Model) -> list[ir.Value]:
    """Returns the untyped values that are, or may be, sequences or optionals, as far as the operators tell."""
    found: dict[ir.Value, None] = {}

    def is_one(value: ir.Value) -> bool:
        return value in found or _is_sequence(value)

    for node in all_nodes(model):
        op_type = node.op_type
        if not node.domain and (op_type in _MAKE or (op_type in _PASS_ON and any(map(is_one, _near(node))))):
            found.update(dict.fromkeys(value for value in node.outputs if value.type is None))
    return list(found)


def _near(node: ir.Node) -> list[ir.Value]:
    """The inputs of a node, and the outputs of its subgraphs."""
    inner = [value for graph in subgraphs(node) for value in graph.outputs]
    return [*(value for value in node.inputs if value is not None), *inner]


def _is_sequence(value: ir.Value) -> bool:
    made = (producer := value.producer()) is not None and not producer.domain and producer.op_type in _MAKE
    return made or isinstance(value.type, ir.SequenceType | ir.OptionalType)
