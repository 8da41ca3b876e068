"""Patterns of one operator on distinct variables are bound without a search, and to the same values."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from onnxscript.rewriter.pattern import Pattern

from rewriter.graph._onnxscript import binder

PATTERNS = {
    "two": lambda op, a, b: op.Add(a, b, _outputs=["out"]),
    "one": lambda op, a: op.Add(a, _outputs=["out"]),
    "one and more": lambda op, a: op.Add(a, _allow_other_inputs=True, _outputs=["out"]),
    "same": lambda op, a: op.Add(a, a, _outputs=["out"]),
    "outputs": lambda op, a, b: op.Add(a, b, _outputs=["out", "more"]),
    "nested": lambda op, a, b: op.Add(op.Neg(a), b, _outputs=["out"]),
    "attribute": lambda op, a, b: op.Add(a, b, axis=1, _outputs=["out"]),
    "constant": lambda op, a: op.Add(a, 1, _outputs=["out"]),
}


def graphs():
    """A node for each way in which a pattern may fail."""
    x, y, z = (ir.val(name, ir.DataType.FLOAT, [2]) for name in "xyz")
    negated = ir.node("Neg", [x])
    one = ir.val("one", ir.DataType.INT64, [], const_value=ir.tensor(1, name="one"))
    nodes = [
        ir.node("Add", [x, y]),
        ir.node("Add", [x, x]),
        ir.node("Add", [x, y, z]),
        ir.node("Add", [x]),
        ir.node("Add", [None, y]),
        ir.node("Add", [x, None]),
        ir.node("Add", [x, y], num_outputs=2),
        ir.node("Add", [x, y], {"axis": 1}),
        ir.node("Add", [negated.outputs[0], y]),
        ir.node("Add", [x, one]),
    ]
    graph = ir.Graph([x, y, z], [], nodes=[negated, *nodes], initializers=[one], opset_imports={"": 21})
    return ir.Model(graph, ir_version=10), nodes


@pytest.mark.parametrize("name", PATTERNS)
def test_as_the_matcher(name):
    pattern = Pattern(PATTERNS[name], name=name)
    model, nodes = graphs()
    bind = binder(pattern)
    for node in nodes:
        match = pattern.match(model, model.graph, node, check_nodes_are_removable=False)
        found = bind(model, node)
        # onnxscript calls it a match, and binds nothing, where the node has fewer outputs than the pattern.
        matches = bool(match) and all(v.name in match.bindings for v in pattern._target_pattern.outputs if v.name)
        assert matches == (found is not None), node
        if found is not None:
            assert dict(match.bindings) == dict(found)
