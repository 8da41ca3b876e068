"""Token axes by themselves: two unknown extents in one dimension lie as they were flattened, whatever their names."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.numpy_helper import from_array

from rewriter.facts import Facts
from rewriter.facts.constants import constants
from rewriter.rules.blocks.axes import Atom
from rewriter.rules.blocks.experts import RECOGNISERS
from rewriter.rules.blocks.token_axes import token_axes

CONSTANTS = {
    "rows": np.array([-1, 8], np.int64),
    "groups": np.array([-1, 2, 4], np.int64),
    "zero": np.array(0, np.float32),
}


def axes_of_y(body: str, inputs: str, declared: str = "") -> list[list[str]]:
    """The names of the extents along each dimension but the last of ``y``, of which the model says a product."""
    text = f'<ir_version: 10, opset_import: ["" : 21]> g ({inputs}) => (y) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(from_array(array, name) for name, array in CONSTANTS.items())
    model = ir.from_proto(proto)
    known = Facts(model, constants)
    known.compute()
    facts = Facts(model, RECOGNISERS, known)
    facts.compute()
    (y,) = (v for node in model.graph for v in node.outputs if v.name == "y")
    if declared:
        y.shape = ir.Shape([declared, 8])
    found = token_axes(facts, y)
    assert found is not None

    def named(dim: tuple[Atom, ...]) -> list[str]:
        return [str(symbol) for atom in dim for symbol in atom.size.symbols]

    assert [atom.index for dim in found for atom in dim] == list(range(sum(map(len, found))))
    return [named(dim) for dim in found]


@pytest.mark.parametrize(("outer", "inner"), [("s77", "s27"), ("batch", "sequence"), ("Z", "A")])
@pytest.mark.parametrize(
    "body",
    [
        "y = Reshape (x, rows)",
        "v = Reshape (x, rows) y = Sigmoid (v)",
        # a mask of groups is made of the same tokens, which it has flattened already
        "v = Reshape (x, rows) g = Reshape (v, groups) b = Greater (g, zero) m = Reshape (b, rows) y = Where (m, v, v)",
        # and so are scores in groups, and put together again
        "v = Reshape (x, rows) g = Reshape (v, groups) s = Sigmoid (g) y = Reshape (s, rows)",
    ],
)
def test_tokens_lie_as_they_were_flattened(body, outer, inner):
    declared = "*".join(sorted((outer, inner)))
    assert axes_of_y(body, f"float[{outer},{inner},8] x", declared) == [[outer, inner]]


def test_one_extent_needs_no_order():
    assert axes_of_y("y = Sigmoid (x)", "float[S,B,8] x") == [["S"], ["B"]]
