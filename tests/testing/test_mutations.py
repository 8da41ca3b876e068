"""Mutations: each finds its places, changes one fact, and what comes of it runs, wherever the place is."""

from __future__ import annotations

import functools

import onnx_ir as ir
import pytest
from hypothesis import Phase, find, settings
from support import parse, run

from rewriter.graph.contents import all_nodes
from rewriter.parity import apart
from rewriter.testing import projections, unrolled_experts
from rewriter.testing.change.legal import others
from rewriter.testing.change.mutations import MUTATIONS, RefusedError, copy_model, places, require_runnable
from rewriter.testing.draw.placements import PLACEMENTS
from rewriter.testing.promises.agreement import draw_feeds

SEARCH = settings(max_examples=200, derandomize=True, database=None, phases=[Phase.generate])
MODEL = """
g (float[2,3] x) => (float[2,3] y)
  <float[2,3] w = {1, 2, 3, 4, 5, 6}, float[2,3] v = {6, 5, 4, 3, 2, 1},
   int64[2] shape = {2, 3}, int64[2] axes = {0, 1}> {
    [a] a = Add (x, w)
    [b] b = Add (a, v)
    [s] s = Softmax <axis = 1> (b)
    [r] r = Reshape (s, shape)
    [m] m = Max (r, w)
    [t] t = ReduceSum <keepdims = 1> (m, axes)
    [y] y = Mul (m, t)
}
"""
CHANGES = {
    "attribute_changed": "Softmax node 's': axis 1 -> 0",
    "attribute_removed": "Softmax node 's': axis removed",
    "attribute_added": "ReduceSum node 't': noop_with_empty_axes 1 added",
    "inputs_swapped": "Max node 'm': inputs 0 and 1 swapped",
    "inputs_exchanged": "Add node 'a' and Add node 'b': input 1 exchanged",
    "input_dropped": "ReduceSum node 't': input 1 ('axes') dropped",
    "operator_replaced": "Mul node 'y': Div in its place",
    "number_changed": "constant 'w': 2.0 at [0, 1] -> 5.0",
    "numbers_swapped": "constant 'shape': [2, 3] -> [3, 2]",
    "number_dropped": "constant 'axes': [0, 1] without its last element",
    "rows_swapped": "constant 'w': rows 0 and 1 swapped",
    "shape_changed": "constant 'w': shape [2, 3] -> [1, 2, 3]",
    "type_changed": "constant 'w': stored as FLOAT16, behind a Cast",
    "unshared": "constant 'w': its last reader has a copy, [0, 0] changed",
    "shared": "constant 'v': 'w' in its place",
    "constant_overridable": "constant 'w': also a graph input, so that a caller may override it",
    "constant_given": "constant 'w': a graph input",
    "value_is_output": "value 's': also a graph output",
    "second_reader": "value 's': another reader",
    "value_rounded": "value 's': cast to FLOAT16 and back",
}


def changed(model, kind, what):
    """The model with one change, before it is looked at."""
    copy = copy_model(model)
    place = next(place for place in places(copy)[kind] if place.what == what)
    place.change()
    return copy


def nested_place(model, kind):
    """The last place of a kind: the one that is furthest inside."""
    return places(copy_model(model))[kind][-1].what


def test_every_mutation_is_shown():
    assert set(CHANGES) == {mutation.__name__ for mutation in MUTATIONS}


@pytest.mark.parametrize("kind", CHANGES)
def test_each_changes_one_fact(kind):
    model = parse(MODEL)
    before = ir.to_proto(model).SerializeToString()
    other = changed(model, kind, CHANGES[kind])
    assert ir.to_proto(model).SerializeToString() == before, "the given model is left as it is"
    if kind == "numbers_swapped":
        return
    near = require_runnable(other, model)
    assert ir.to_proto(near).SerializeToString() != before
    run(near, draw_feeds(near, 0))


def refused(reason, model, kind, what):
    with pytest.raises(RefusedError, match=reason):
        require_runnable(changed(model, kind, what), model)


def test_a_model_that_does_not_run_is_refused():
    refused("ncompatible dimensions", parse(MODEL), "numbers_swapped", CHANGES["numbers_swapped"])


@pytest.mark.parametrize("scales", [6, 3])
def test_what_would_end_the_process_is_refused(scales):
    """ONNX Runtime's schema calls the scales of integer experts optional, and its kernel reads them unasked."""
    weights = "uint8[1,16,8] w, float[1,16,1] s"
    domains = ', "com.microsoft" : 1'
    text = f"g (float[3,16] x, float[3,1] r, {weights}) => (float[3,16] y) {{ [q] y = com.microsoft.QMoE"
    attributes = '<k = 1, expert_weight_bits = 4, block_size = 16, activation_type = "identity">'
    model = parse(f'{text} {attributes} (x, r, w, s, "", w, s) }}', domains=domains)
    require_runnable(copy_model(model), model)
    refused(r"_scales\) is missing", model, "input_dropped", f"QMoE node 'q': input {scales} ('s') dropped")


def test_what_only_the_runtime_knows_it_judges():
    model = parse(
        "g (float[8] x) => (float[8] y) { [q] y = com.microsoft.QuickGelu <alpha = 1.0> (x) }",
        domains=', "com.microsoft" : 1',
    )
    assert [node.op_type for node in require_runnable(copy_model(model), model).graph] == ["QuickGelu"]


def test_what_rounding_alone_changes_is_refused():
    """Nothing can be demanded of a rewrite that may round otherwise."""
    model = parse("g (float[8] x) => (float[8] y) <float c = {30}> { a = Mul (x, x) b = Mul (a, c) y = Sqrt (b) }")
    calm, wild = "Sqrt node of 'y': Reciprocal in its place", "Sqrt node of 'y': Exp in its place"
    require_runnable(changed(model, "operator_replaced", calm), model)
    refused("rounding of its inputs alone changes output 'y'", model, "operator_replaced", wild)


@functools.cache
def example(placement):
    """A model whose experts stand there, and hold a constant there."""

    def inside(model):
        return placement == "main" or any(node.op_type == "Gather" for node in all_nodes(model))

    strategy = unrolled_experts(
        placements=[placement], dtypes=["float32"], selections=["gather"], obstacles=[], max_size=3, typed=True
    )
    return find(strategy, inside, settings=SEARCH)


@pytest.mark.parametrize("kind", ["value_is_output", "second_reader"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_an_inner_value_reaches_the_outputs_of_the_model(placement, kind):
    model = example(placement)
    inner = next(node for node in all_nodes(model) if node.op_type == "Gather")
    what = {"value_is_output": "also a graph output", "second_reader": "another reader"}[kind]
    near = require_runnable(changed(model, kind, f"value '{inner.outputs[0].name}': {what}"), model)
    assert len(near.graph.outputs) == len(model.graph.outputs) + 1


@pytest.mark.parametrize("kind", ["constant_given", "constant_overridable"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_an_inner_constant_becomes_an_input_of_the_model(placement, kind):
    model = example(placement)
    near = require_runnable(changed(model, kind, nested_place(model, kind)), model)
    assert len(near.graph.inputs) > len(model.graph.inputs)


@pytest.mark.parametrize("name", ["swiglu_limit", "activation_type", "k", "bits", "block_size"])
def test_attributes_of_the_runtime_stay_legal(name):
    """What their specification excludes may end the process."""
    legal = {
        "swiglu_limit": lambda v: v >= 0,
        "activation_type": lambda v: v in ("relu", "relu2", "gelu", "silu", "identity", "swiglu", "geglu"),
        "k": lambda v: v >= 1,
        "bits": lambda v: v in (2, 4, 8),
        "block_size": lambda v: v >= 16 and not v & (v - 1),
    }[name]
    node = ir.node("QMoE", [], domain="com.microsoft")
    for value in ("relu",) if name == "activation_type" else (1, 16, 2.0):
        given = list(others(node, name, value))
        assert given and all(map(legal, given)), given


def test_every_mutation_finds_places_in_what_is_drawn():
    found = set()
    for strategy in (unrolled_experts(placements=["loop-if"]), projections(placements=["main"])):
        found |= set(places(copy_model(find(strategy, lambda m: len(list(all_nodes(m))) > 4, settings=SEARCH))))
    assert {"attribute_changed", "number_changed", "constant_overridable", "second_reader"} <= found


@pytest.mark.parametrize("ends", ["infer", "run"])
def test_what_ends_the_process_is_no_model_and_the_next_is(ends, monkeypatch):
    """Which models end it differs from one release of the runtime to the next, so here it is killed."""
    model = parse("g (float[2] x) => (float[2] y) { y = Neg (x) }")
    answer, left = apart._Worker.answer, [ends]

    def hit(self, call, arguments, timeout):
        if call in left:
            left.remove(call)
            self.process.kill()
        return answer(self, call, arguments, timeout)

    with monkeypatch.context() as patch:
        patch.setattr(apart._Worker, "answer", hit)
        with pytest.raises(RefusedError, match="killed"):
            require_runnable(copy_model(model), model)
    assert [node.op_type for node in require_runnable(copy_model(model), model).graph] == ["Neg"]
