"""Views against ONNX's own operators: whatever chain of movement operators is drawn, a view shows what they compute."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import assume, event, given, note
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from rewriter.errors import TargetError
from rewriter.facts import Facts
from rewriter.facts.constants import constants
from rewriter.parity.runtime import OrtRuntime
from rewriter.tensors import View
from rewriter.testing.draw.graph import Scope, floats

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
EXTREMES = st.sampled_from((INT64_MIN, INT64_MIN + 1, -(2**31), 2**31 - 1, INT64_MAX))


def facts_of(model):
    facts = Facts(model, constants)
    facts.compute()
    return facts


def finished(scope, output, rank):
    scope.op("Identity", "x")
    graph = helper.make_graph(
        scope.nodes,
        "chain",
        [floats("x", "float32", [1])],
        [floats(output, "float32", [None] * rank)],
        list(scope.initializers.values()),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", scope.opset)], ir_version=10)


def computed_by_onnx(model):
    feeds = {"x": np.zeros(1, np.float32)}
    try:
        return next(iter(OrtRuntime(optimize=False).run(model, feeds).values()))
    except TargetError:
        return None


@st.composite
def _gather(draw, scope, value, shape):
    assume(shape)
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    extent = shape[axis]
    assume(extent)
    index = st.integers(-extent, extent - 1)
    if draw(st.booleans()):
        indices = scope.ints(draw(index), scalar=True)
    elif draw(st.booleans()):
        indices = scope.ints(*draw(st.lists(index, min_size=1, max_size=4)))
    else:
        start, step, count = draw(index), draw(st.integers(-2, 2)), draw(st.integers(1, 3))
        run = [start + step * i for i in range(count)]
        assume(all(-extent <= i < extent for i in run))
        indices = scope.ints(*run)
    return scope.op("Gather", value, indices, axis=axis)


@st.composite
def _slice(draw, scope, value, shape):
    assume(shape)
    rank = len(shape)
    axes = draw(st.lists(st.integers(0, rank - 1), min_size=1, max_size=rank, unique=True))
    bound = st.one_of(st.integers(-6, 6), EXTREMES)
    starts, ends = ([draw(bound) for _ in axes] for _ in "se")
    axes = [axis - rank if draw(st.booleans()) else axis for axis in axes]
    step = st.one_of(st.integers(-3, 3), EXTREMES).filter(bool)
    steps = [scope.ints(*(draw(step) for _ in axes))] if draw(st.booleans()) else []
    return scope.op("Slice", value, scope.ints(*starts), scope.ints(*ends), scope.ints(*axes), *steps)


@st.composite
def _split(draw, scope, value, shape):
    assume(shape)
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    extent = shape[axis]
    count = draw(st.integers(1, 3))
    if draw(st.booleans()):
        assume(extent >= count)
        parts = scope.ops("Split", value, count=count, axis=axis, num_outputs=count)
    else:
        lengths = [draw(st.integers(0, extent)) for _ in range(count - 1)]
        assume(sum(lengths) <= extent)
        parts = scope.ops("Split", value, scope.ints(*lengths, extent - sum(lengths)), count=count, axis=axis)
    return draw(st.sampled_from(parts))


@st.composite
def _sequence(draw, scope, value, shape):
    assume(shape)
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    assume(shape[axis])
    sequence = scope.op("SplitToSequence", value, axis=axis, keepdims=draw(st.integers(0, 1)))
    at = draw(st.integers(-shape[axis], shape[axis] - 1))
    return scope.op("SequenceAt", sequence, scope.ints(at, scalar=True))


@st.composite
def _gather_nd(draw, scope, value, shape):
    assume(shape and 0 not in shape)
    depth = draw(st.integers(1, len(shape)))
    index = scope.ints(*(draw(st.integers(-d, d - 1)) for d in shape[:depth]))
    if draw(st.booleans()):
        index = scope.op("Unsqueeze", index, scope.ints(0))
    return scope.op("GatherND", value, index)


@st.composite
def _squeeze(draw, scope, value, shape):
    ones = [i for i, d in enumerate(shape) if d == 1]
    if draw(st.booleans()):
        return scope.op("Squeeze", value)
    assume(ones)
    axes = draw(st.lists(st.sampled_from(ones), min_size=1, unique=True))
    return scope.op("Squeeze", value, scope.ints(*(a - len(shape) if draw(st.booleans()) else a for a in axes)))


@st.composite
def _unsqueeze(draw, scope, value, shape):
    count = draw(st.integers(1, 2))
    rank = len(shape) + count
    axes = draw(st.lists(st.integers(0, rank - 1), min_size=count, max_size=count, unique=True))
    return scope.op("Unsqueeze", value, scope.ints(*(a - rank if draw(st.booleans()) else a for a in axes)))


@st.composite
def _transpose(draw, scope, value, shape):
    if not shape or draw(st.booleans()):
        return scope.op("Transpose", value)
    return scope.op("Transpose", value, perm=draw(st.permutations(range(len(shape)))))


@st.composite
def _reshape(draw, scope, value, shape):
    size = int(np.prod(shape))
    target, left = [], size
    for _ in range(draw(st.integers(0, 4))):
        divisors = [d for d in range(1, left + 1) if left % d == 0] or [0, 1, 2]
        target.append(draw(st.sampled_from(divisors)))
        left //= max(target[-1], 1)
    if left > 1:
        target.append(left)
    if target and draw(st.booleans()):
        target[draw(st.integers(0, len(target) - 1))] = draw(st.sampled_from((-1, 0)))
    allow = {"allowzero": 1} if draw(st.booleans()) else {}
    operand = scope.ints(*target) if target else scope.constant("empty", np.zeros(0, np.int64))
    return scope.op("Reshape", value, operand, **allow)


@st.composite
def _flatten(draw, scope, value, shape):
    return scope.op("Flatten", value, axis=draw(st.integers(-len(shape), len(shape))))


def _identity(scope, value, shape):
    return st.builds(lambda: scope.op("Identity", value))


SUBTLE = ("the indices do not step evenly", "it runs backwards to INT_MAX", "-1 has no one value")
"""What runtimes compute and a view cannot say, or should not."""
MOVES = (
    _identity,
    _gather,
    _slice,
    _split,
    _sequence,
    _gather_nd,
    _squeeze,
    _unsqueeze,
    _transpose,
    _reshape,
    _flatten,
)


@given(st.data())
def test_a_view_shows_what_the_operators_compute(data):
    shape = tuple(data.draw(st.lists(st.integers(0, 4), max_size=4), "shape"))
    scope = Scope(21, operands=data.draw(st.sampled_from(("initializer", "constant-ints", "sum"))))
    value = scope.constant("w", np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape))
    for _ in range(data.draw(st.integers(1, 4), "length")):
        value = data.draw(data.draw(st.sampled_from(MOVES))(scope, value, shape), "operator")
        proto = finished(scope, value, 0)
        del proto.graph.output[0].type.tensor_type.shape.dim[:]
        proto.graph.output[0].type.tensor_type.ClearField("shape")
        note(onnx.printer.to_text(proto))
        expected = computed_by_onnx(proto)
        model = ir.from_proto(proto)
        view = facts_of(model).get(model.graph.outputs[0], View)
        if expected is None:  # the operators themselves refuse their operands: a view may be anything, but no exception
            event("not computable")
            return
        shape = expected.shape
        if view is None:
            why = facts_of(model).why_not(model.graph.outputs[0])
            assert why.startswith(SUBTLE)
            event(why)
            return
        assert view.shape == expected.shape
        np.testing.assert_array_equal(view.numpy(), expected)


OLD = {
    "Squeeze": "y = Squeeze <axes = [0]> (s)",
    "Slice": "y = Slice <starts = [1], ends = [2], axes = [0]> (w)",
    "Slice without axes": "y = Slice <starts = [1, -1], ends = [2, 99]> (w)",
    "Split": "a, y = Split <axis = 0, split = [2, 1]> (w)",
    "Unsqueeze": "y = Unsqueeze <axes = [0, -1]> (w)",
}


@pytest.mark.parametrize("spelling", OLD)
def test_operands_were_attributes_once(spelling):
    text = OLD[spelling].replace("Squeeze <axes = [0]> (s)", "Squeeze <axes = [0]> (part)")
    part = "part = Slice <starts = [1], ends = [2], axes = [0]> (w)\n" if "part" in text else ""
    graph = f"g (float[1] x) => (float y) <float[3, 2] w = {{0, 1, 2, 3, 4, 5}}> {{ {part}{text} }}"
    proto = onnx.parser.parse_model(f'<ir_version: 7, opset_import: ["" : 9]>\n{graph}')
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    model = ir.from_proto(proto)
    view = facts_of(model).get(model.graph.outputs[0], View)
    (expected,) = ReferenceEvaluator(proto).run(None, {"x": np.zeros(1, np.float32)})
    np.testing.assert_array_equal(view.numpy(), expected)


def declined(body, *, inputs="float[1] x, int64 i", output="y"):
    graph = f"g ({inputs}) => (float {output}) <float[3, 2, 2] w = {{0,1,2,3,4,5,6,7,8,9,10,11}}> {{ {body} }}"
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]>\n{graph}')
    facts = facts_of(model)
    assert facts.get(model.graph.outputs[0], View) is None
    return facts.why_not(model.graph.outputs[0])


DYNAMIC = {
    "y = Gather (w, i)": "the index depends on an input",
    "u = Unsqueeze (i, z) z = Constant <value_ints = [0]> () y = GatherND (w, u)": "the index depends on an input",
    "s = SplitToSequence (w) y = SequenceAt (s, i)": "the position depends on an input",
    "z = Constant <value_ints = [0]> () u = Unsqueeze (i, z) y = Slice (w, u, u)": "the bounds depend on an input",
    "z = Constant <value_ints = [0]> () u = Unsqueeze (i, z) y = Reshape (w, u)": "the shape depends on an input",
    "z = Constant <value_ints = [0]> () u = Unsqueeze (i, z) y = Squeeze (w, u)": "the axes depend on an input",
    "c = Constant <value_ints = [0, 2, 1]> () y = Gather (w, c)": "the indices do not step evenly",
    "c = Constant <value_int = 7> () y = Gather (w, c)": "index [7] is outside axis 0 of extent 3",
    "y = Cast <to = 10> (w)": "the cast from FLOAT to FLOAT16 rounds",
}


@pytest.mark.parametrize("body", DYNAMIC)
def test_what_is_no_view_says_why(body):
    ordered = body
    if body.startswith("u = "):
        ordered = "z = Constant <value_ints = [0]> () u = Unsqueeze (i, z) y = GatherND (w, u)"
    assert declined(ordered) == DYNAMIC[body]


def test_a_caller_may_override_an_initializer_that_is_an_input():
    text = "g (float[1] x, float[3] w) => (float[3] y) <float[3] w = {1, 2, 3}> { y = Identity (w) }"
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}')
    assert facts_of(model).get(model.graph.outputs[0], View) is None


assert TensorProto.FLOAT
