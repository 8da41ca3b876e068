"""qmoe-layout: raw to CUTLASS and back, so that a CUDA export runs on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_models import (
    INTERLEAVED,
    attributes_of,
    feeds,
    initializers_of,
    moe_model,
    nodes_of,
    ort,
    relative,
    rewrite,
    rule_set,
    untouched,
)

from rewriter.parity.runtime import OrtRuntime, ReferenceRuntime, available
from rewriter.target import Target


def layout(name="auto", unmarked=None):
    return rule_set([{"qmoe-layout": {"layout": name, "unmarked": unmarked}}])


def raw_model(dtype=np.float32, *, bits=4, symmetric=True, target="cpu@1.31", **options):
    rules = rule_set(["moe-to-qmoe"], bits=bits, symmetric=symmetric)
    return rewrite(moe_model(INTERLEAVED, dtype=dtype, **options), rules, target).model


def stamp_of(model):
    (node,) = nodes_of(model, "QMoE")
    return {p.key: p.value for p in node.metadata_props}.get("rewriter.layout")


def unstamped(model):
    (node,) = nodes_of(model, "QMoE")
    del node.metadata_props[:]
    return model


@settings(max_examples=15, deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    hidden=st.sampled_from([64, 128, 192]),
    inter=st.sampled_from([64, 128]),
    architecture=st.sampled_from(["sm80", "sm90"]),
)
def test_raw_to_prepacked_to_raw(*, bits, symmetric, hidden, inter, architecture):
    raw = raw_model(bits=bits, symmetric=symmetric, hidden=hidden, inter=inter, experts=4)
    target = "cuda:sm80" if architecture == "sm80" else "cuda:sm90@1.27"
    there = rewrite(raw, layout(f"cutlass-{architecture}"), target)
    assert there.report.applied == {"qmoe-layout": 1} and stamp_of(there.model) == f"cutlass-{architecture}"
    (node,) = nodes_of(there.model, "QMoE")
    assert attributes_of(node).get("weights_prepacked") == (1 if architecture == "sm80" else None)
    reads = Target.parse("auto").version >= (1, 32) and (bits, symmetric, architecture) == (4, True, "sm80")
    assert [p.runtime for p in there.report.proofs] == ["cpu" if reads else "reference"]
    back = rewrite(there.model, layout(), "cpu@1.31")
    assert stamp_of(back.model) == "raw" and attributes_of(nodes_of(back.model, "QMoE")[0])["weights_prepacked"] == 0
    ours, theirs = initializers_of(back.model), initializers_of(raw)
    (before,), (after,) = nodes_of(raw, "QMoE"), nodes_of(back.model, "QMoE")
    for slot in (2, 3, 5, 6):
        np.testing.assert_array_equal(ours[after.input[slot]], theirs[before.input[slot]])
    assert not rewrite(back.model, layout(), "cpu@1.31").report.applied


def test_weights_of_cuda_are_not_given_unasked_to_a_kernel_that_rounds_activations():
    packed = rewrite(raw_model(bits=8, inter=128), layout("cutlass-sm80"), "cuda:sm80").model
    result = rewrite(packed, layout() | {"rounded_activations": False}, "cpu@1.32")
    (decline,) = result.report.declines
    assert "QMoE on target cpu@1.32 rounds activations to 8 bits at 8 bits" in decline.reason
    assert stamp_of(result.model) == "cutlass-sm80"
    assert stamp_of(rewrite(packed, layout(), "cpu@1.32").model) == "raw"


def test_a_prepacked_model_runs_on_the_cpu_once_it_is_raw():
    raw = raw_model(inter=128)
    packed = rewrite(raw, layout("cutlass-sm80"), "cuda:sm80").model
    inputs = feeds()
    np.testing.assert_array_equal(ort(rewrite(packed, layout(), "cpu").model, inputs), ort(raw, inputs))


def test_the_option_names_the_layout_of_an_unmarked_node():
    raw = raw_model()  # fc1 [128, 64 / 2]: no shape tells; fc2 [64, 64 / 2] neither
    packed = rewrite(raw, layout("cutlass-sm80"), "cuda:sm80").model
    square = unstamped(packed)
    result = rewrite(square, layout(unmarked="cutlass-sm80"), "cpu@1.31")
    assert result.report.applied == {"qmoe-layout": 1}
    np.testing.assert_array_equal(ort(result.model, feeds()), ort(raw, feeds()))


@pytest.mark.skipif(
    Target.parse("auto").version < (1, 32), reason="before 1.32 the CPU provider reads raw weights alone"
)
def test_one_file_for_cuda_and_the_cpu():
    """In float16, what is written for CUDA the CPU provider of 1.32 computes too."""
    packed = raw_model(np.float16, target="cuda", inter=128)
    assert stamp_of(packed) == "cutlass-sm80"
    inputs = feeds(np.float16)
    assert relative(ort(packed, inputs), ReferenceRuntime().run(packed, inputs)["y"]) < 2e-3


DECLINES = {
    "unmarked": (
        lambda: unstamped(rewrite(raw_model(), layout("cutlass-sm80"), "cuda:sm80").model),
        layout(),
        "cpu@1.31",
        "name it with the option 'unmarked'",
    ),
    "not read": (raw_model, layout("cutlass-sm80"), "cpu@1.31", "the cutlass-sm80 layout has no kernel"),
    "sm90": (raw_model, layout("cutlass-sm90"), "cuda:sm90@1.31", "the cutlass-sm90 layout has no kernel"),
    "no kernel": (raw_model, layout(), "dml", "reads no layout"),
    "shape": (
        lambda: raw_model(hidden=96, inter=96),
        layout("cutlass-sm80"),
        "cuda:sm80",
        "K = 96 is not a multiple of 64",
    ),
    "bits": (lambda: raw_model(bits=2), layout("cutlass-sm80"), "cuda:sm80", "the CUTLASS layout exists for 4 and 8"),
}


@pytest.mark.parametrize("name", DECLINES)
def test_declines(name):
    make, rules, target, reason = DECLINES[name]
    model = make()
    result = rewrite(model, rules, target)
    assert [reason in d.reason for d in result.report.declines] == [True], result.report.declines
    assert result.model.graph.SerializeToString(deterministic=True) == untouched(model)


@pytest.mark.gpu
@pytest.mark.skipif("cuda" not in available(), reason="no CUDA device, or no onnxruntime-gpu")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["raw", "cutlass-sm80"])
def test_cuda_runs_both_layouts(*, name, bits, symmetric):
    raw = raw_model(np.float16, bits=bits, symmetric=symmetric, target="cuda:sm80", inter=128)
    model = raw if name == "raw" else rewrite(raw, layout(name), "cuda:sm80").model
    inputs = feeds(np.float16)
    expected = ReferenceRuntime().run(model, inputs)["y"]
    assert relative(OrtRuntime("cuda").run(model, inputs)["y"], expected) < 5e-3
