"""What recognisers state of a few operators, from their text: the value ``y`` of a small graph."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx.numpy_helper import from_array

from rewriter.facts import Facts
from rewriter.facts.constants import constants
from rewriter.rules.blocks.axes import Located
from rewriter.rules.blocks.experts import RECOGNISERS

RNG = np.random.default_rng(0)
FLOATS = {
    **{"gate": (8, 6), "up": (8, 6), "down": (6, 8), "gates": (4, 8, 6), "ups": (4, 8, 6), "downs": (4, 6, 8)},
    **{"bias": (6,), "biases": (4, 1, 6), "rows": (4, 6), "wide": (6, 8), "shift": (4,), "scales": (6,)},
}
INTEGERS = {
    **{"zero": 0, "one": 1, "two": 2, "three": 3, "k": [2], "four": [4], "halves": [3, 3], "flat": [-1]},
    **{"first": [0], "second": [1], "third": [2], "last": [-1], "numbers": [0, 1, 2, 3], "wrong": [3, 2, 1, 0]},
    **{"table": [[0, 1], [2, 3], [3, 0]], "twice": [[0, 0], [2, 3]], "negative": [[0, -1], [2, 3]]},
}
CONSTANTS = {
    **{name: RNG.standard_normal(shape, dtype=np.float32) for name, shape in FLOATS.items()},
    **{name: np.array(given, np.int64) for name, given in INTEGERS.items()},
    **{f"c{number:g}": np.array(number, np.float32) for number in (0, 1, 2, 3, 7)},
    "tiny": np.array(1e-20, np.float32),
    "minus": np.array(-7, np.float32),
    "half": np.array(0.5, np.float32),
    "infinite": np.array(-np.inf, np.float32),
    "off_on": np.array([0, 1], np.float32),
    "codes": RNG.integers(0, 256, (6, 1, 8), np.uint8),
}
CHOICE = "p = Softmax (r) v, i = TopK (p, k)"
"""A router's two of four experts, and their probabilities."""
PLAIN = "h = MatMul (x, gate) a = Relu (h) o = MatMul (a, down)"
"""One expert."""
STACKED = "h = MatMul (x, gates) a = Relu (h) o = MatMul (a, downs)"
"""All four, [E, T, H]."""
SORTED = f"{CHOICE} f = Reshape (i, flat) n = Shape (f) s, d = TopK <axis = 0, largest = 0> (f, n)"
"""(token, slot) pairs in the order of their experts."""


def facts_of(body):
    """The facts of a graph of logits ``r`` [T, 4], tokens ``x`` [T, 8], ``ids`` [T] and CONSTANTS; and ``y``."""
    imports = 'ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]'
    inputs = "float[T,4] r, float[T,8] x, float b, int64[T] ids"
    proto = onnx.parser.parse_model(f"<{imports}> g ({inputs}) => (y) {{ {body} }}")
    proto.graph.initializer.extend(from_array(array, name) for name, array in CONSTANTS.items())
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    known = Facts(model, constants)
    known.compute()
    facts = Facts(model, RECOGNISERS, known)
    facts.compute()
    (y,) = (v for node in model.graph for v in node.outputs if v.name == "y")
    return facts, y


def stated(body, kind=Located):
    """What is stated of ``y``, or None."""
    facts, y = facts_of(body)
    return facts.get(y, kind)


def held(body):
    """The content of ``y``, or None."""
    located = stated(body)
    return None if located is None else located.content


def kinds(body):
    """What lies along each dimension of ``y``."""
    return [tuple(atom.kind for atom in dim) for dim in stated(body).axes]


def reason(body):
    """Why nothing is stated of ``y``."""
    facts, y = facts_of(body)
    assert facts.get(y, Located) is None
    return facts.why_not(y)
