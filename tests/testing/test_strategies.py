"""The strategies: each choice can be drawn, what is drawn is valid, and it shrinks to something one can read."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
from hypothesis import Phase, find, given, settings
from hypothesis.errors import InvalidArgument
from support import histogram

from rewriter.errors import TargetError
from rewriter.parity.runtime import OrtRuntime
from rewriter.testing import moe_models, projections, unrolled_experts
from rewriter.testing._agreement import draw_feeds
from rewriter.testing._consumers import CONSUMERS
from rewriter.testing._placements import PLACEMENTS
from rewriter.testing._spellings import SELECTIONS

STRATEGIES = {"unrolled_experts": unrolled_experts, "moe_models": moe_models, "projections": projections}
SEARCH = settings(
    max_examples=500, derandomize=True, database=None, phases=[Phase.generate, Phase.shrink]
)  # the explain phase would overwrite what find returns


def smallest(strategy, wanted=lambda model: True):
    return find(strategy, wanted, settings=SEARCH)


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_is_drawn_is_valid_and_runs(name):
    failed = []

    @given(STRATEGIES[name](max_size=8))
    def valid(model):
        proto = ir.to_proto(model)
        onnx.checker.check_model(proto, full_check=True)
        try:
            OrtRuntime().run(proto, draw_feeds(model, 0))
        except TargetError as error:
            failed.append(str(error))

    valid()
    assert len(failed) <= 1, failed


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
    taken = smallest(
        unrolled_experts(obstacles=["stack-is-input"]), lambda m: any(v.name == "W" for v in m.graph.inputs)
    )
    assert "W" in taken.graph.initializers
    assert smallest(unrolled_experts(obstacles=["output-in-chain"]), lambda m: len(m.graph.outputs) > 1)
    assert smallest(unrolled_experts(obstacles=["dynamic-index"]), lambda m: any(v.name == "i" for v in m.graph.inputs))


def test_the_same_choices_draw_the_same_weights():
    first, second = (smallest(unrolled_experts()).graph.initializers["W"].const_value for _ in range(2))
    assert first.tobytes() == second.tobytes()


WRONG = {
    "max_experts must be a positive integer, not 0": lambda: unrolled_experts(max_experts=0),
    "max_size must be a positive integer, not -1": lambda: projections(max_size=-1),
    "unknown name 'gathr' in selections (did you mean 'gather'?)": lambda: moe_models(selections=["gathr"]),
    "unknown name 'float64' in dtypes": lambda: moe_models(dtypes=["float64"]),
    "placements must be a collection of names, not 'main'": lambda: unrolled_experts(placements="main"),
    "consumers must be a collection of names, not []": lambda: projections(consumers=[]),
}


@pytest.mark.parametrize("message", WRONG)
def test_arguments_are_checked_when_they_are_given(message):
    with pytest.raises(InvalidArgument) as caught:
        WRONG[message]()
    assert str(caught.value).startswith(message)
