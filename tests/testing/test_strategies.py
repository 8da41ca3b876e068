"""The strategies: each choice can be drawn, what is drawn is valid, and it shrinks to something one can read."""

from __future__ import annotations

import inspect
import re

import onnx
import onnx_ir as ir
import pytest
from hypothesis import Phase, find, given, settings
from hypothesis.errors import InvalidArgument
from support import histogram

from rewriter.errors import TargetError
from rewriter.parity.judge import cannot_run
from rewriter.parity.runtime import OrtRuntime
from rewriter.testing import any_models, moe_models, projections, quantized_projections, unrolled_experts
from rewriter.testing.draw.consumers import CONSUMERS
from rewriter.testing.draw.moe_nodes import NODE_OBSTACLES
from rewriter.testing.draw.placements import PLACEMENTS
from rewriter.testing.draw.spellings import SELECTIONS
from rewriter.testing.promises.agreement import draw_feeds
from rewriter.testing.strategies import STRATEGIES

RUNNING = {"moe_nodes": {"obstacles": NODE_OBSTACLES[:-1]}}  # logits of rank 3 run nowhere
SEARCH = settings(
    max_examples=500, derandomize=True, database=None, phases=[Phase.generate, Phase.shrink]
)  # the explain phase would overwrite what find returns


DRAW = settings(SEARCH, phases=[Phase.generate])


def drawn(strategy, wanted):
    """The first that is wanted, however large."""
    return find(strategy, wanted, settings=DRAW)


def smallest(strategy, wanted=lambda model: True):
    return find(strategy, wanted, settings=SEARCH)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.__name__)
def test_what_is_drawn_is_valid_and_runs_where_anything_runs_it(strategy):
    failed = []

    @given(strategy(**RUNNING.get(strategy.__name__, {})))
    def valid(model):
        proto = ir.to_proto(model)
        onnx.checker.check_model(proto, full_check=True)
        bodies = (model.graph, *(function.graph for function in model.functions.values()))
        refused = cannot_run([node for body in bodies for node in body.all_nodes()], "cpu")
        try:
            OrtRuntime().run(proto, draw_feeds(model, 0))
        except TargetError as error:
            lacking = refused or "data type is not supported" in str(error)  # as of halves that ScatterND adds
            failed.extend([] if lacking else [str(error)])

    valid()
    assert len(failed) <= 1, failed


@pytest.mark.parametrize("op_type", ["Slice", "TopK", "MoE", "QMoE", "MatMulNBits", "GatherBlockQuantized"])
def test_any_model_is_one_of_all(op_type):
    assert drawn(any_models(), lambda model: histogram(model)[op_type])


def test_the_smallest_of_each():
    assert histogram(smallest(unrolled_experts())) == {"Gather": 1, "MatMul": 1}
    assert histogram(smallest(projections())) == {"MatMul": 1}
    block = histogram(smallest(moe_models()))
    assert block["Gather"] == 3 and block["MatMul"] == 4 and block["TopK"] == 1, "gate, up, down and the router"


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_placement_shrinks_to_one_expert(placement):
    model = smallest(unrolled_experts(placements=[placement]))
    found = histogram(model)
    assert found["MatMul"] <= 2 and found["Gather"] == found["MatMul"]
    for wrapper, op_type in {"if": "If", "loop": "Loop", "scan": "Scan", "function": "Experts"}.items():
        assert (op_type in found) == (wrapper in placement.split("-"))


OPERATORS = {
    "gather": "Gather",
    "gather-list": "Squeeze",
    "slice": "Slice",
    "split": "Split",
    "split-lengths": "Split",
    "split-to-sequence": "SplitToSequence",
    "gather-nd": "GatherND",
    "reshape-slice": "Reshape",
}


@pytest.mark.parametrize("selection", SELECTIONS)
def test_every_selection_is_drawn(selection):
    operator = OPERATORS.get(selection, OPERATORS.get(selection.rsplit("-", 1)[0], "Gather"))
    strategy = unrolled_experts(selections=[selection], placements=["main"])
    assert smallest(strategy, lambda model: histogram(model)[operator])


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_every_consumer_is_drawn(consumer):
    operator = {"gemm": "Gemm", "einsum": "Einsum"}.get(consumer.split("-")[0], "MatMul")
    assert smallest(projections(consumers=[consumer]), lambda model: histogram(model)[operator])


def test_names_may_be_missing_or_taken():
    assert smallest(unrolled_experts(names=["unnamed"]), lambda m: not any(node.name for node in m.graph))
    clash = smallest(unrolled_experts(names=["clash"], placements=["main"]))
    assert "W__slice_0" in clash.graph.initializers


def test_values_may_have_no_types():
    untyped = smallest(unrolled_experts(typed=False, placements=["main"]))
    (gather,) = (node for node in untyped.graph if node.op_type == "Gather")
    assert gather.outputs[0].type is None


def test_what_can_be_overridden_or_is_an_output():
    taken = drawn(unrolled_experts(obstacles=["stack-is-input"]), lambda m: any(v.name == "W" for v in m.graph.inputs))
    assert "W" in taken.graph.initializers
    assert drawn(unrolled_experts(obstacles=["output-in-chain"]), lambda m: len(m.graph.outputs) > 1)
    assert drawn(unrolled_experts(obstacles=["dynamic-index"]), lambda m: any(v.name == "i" for v in m.graph.inputs))


def test_the_same_choices_draw_the_same_weights():
    first, second = (smallest(unrolled_experts()).graph.initializers["W"].const_value for _ in range(2))
    assert first.tobytes() == second.tobytes()


WRONG = {
    "max_experts must be a positive integer, not 0": lambda: unrolled_experts(max_experts=0),
    "max_size must be a positive integer, not -1": lambda: projections(max_size=-1),
    "unknown name 'gathr' in selections (did you mean 'gather'?)": lambda: moe_models(selections=["gathr"]),
    "unknown number 3 in bits (it may hold 4, 8, 2)": lambda: quantized_projections(bits=[3]),
    "block_sizes must be a collection of numbers, not 32": lambda: quantized_projections(block_sizes=32),
    "projections has no argument 'dtype' (did you mean 'dtypes'?)": lambda: projections(dtype="float32"),
    "unknown name 'float64' in dtypes": lambda: moe_models(dtypes=["float64"]),
    "placements must be a collection of names, not 'main'": lambda: unrolled_experts(placements="main"),
    "consumers must be a collection of names, not []": lambda: projections(consumers=[]),
}


@pytest.mark.parametrize("message", WRONG)
def test_arguments_are_checked_when_they_are_given(message):
    with pytest.raises(InvalidArgument) as caught:
        WRONG[message]()
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.__name__)
def test_help_shows_what_an_argument_may_hold(strategy):
    text = inspect.getdoc(strategy)
    assert "draw:" not in text
    assert not re.search(r"of ``[A-Z_]+``", text)
    assert "where" in text and "'main', 'if', 'loop'" in text


def sparsest(scope, logits, k):
    values, chosen = scope.ops("TopK", scope.op("Softsign", logits), scope.ints(k), count=2, axis=-1)
    return scope.op("Abs", values), chosen


def test_a_router_of_ones_own_is_drawn_with_everything_else():
    model = drawn(moe_models(routers=[sparsest], dtypes=["float16"]), lambda model: histogram(model)["Softsign"] == 2)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_only_a_router_is_written_by_a_function():
    with pytest.raises(InvalidArgument, match="unknown name"):
        moe_models(combines=[sparsest])
