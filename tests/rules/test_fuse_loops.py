"""fuse-experts on loops over the experts: rows chosen by where(mask), an expert, rows added back."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from block_models import LOOPS, ROUTERS, Spelling, block_model
from test_fuse_experts import assert_declines, fuse, fused, operators

from rewriter.parity.runtime import OrtRuntime

LOOP = {"weights": "own", "halves": "apart"}


@pytest.mark.parametrize("combine", LOOPS)
@pytest.mark.parametrize("router", ROUTERS)
def test_a_loop_becomes_one_moe(combine, router):
    model = fused(Spelling(combine=combine, router=router, **LOOP))
    assert not {"NonZero", "ScatterND", "ScatterElements"} & (operators(model).keys() - {"ScatterElements"})


@pytest.mark.parametrize("combine", LOOPS)
def test_biases_activations_and_what_follows(combine):
    fused(Spelling(combine=combine, bias=True, activation="relu", shared=True, **LOOP))
    fused(Spelling(combine=combine, bias=True, halves="split", activation="clamped"))


def test_a_loop_agrees_where_no_token_chose_an_expert():
    model = block_model(Spelling(combine="loop", experts=8, **LOOP))
    result = fuse(model)
    x = {"x": np.random.default_rng(0).standard_normal((1, 8)).astype(np.float32)}
    before, after = (OrtRuntime().run(m, x)["y"] for m in (model, result.model))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("combine", LOOPS)
@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("missing", "expert 1 of 4 is missing"),
        ("doubled", "expert 1 is mixed in twice"),
        ("other-share", "rows of expert 0 are written where expert 2 was chosen"),
        ("other-rows", "rows of expert 2 are written where expert 0 was chosen"),
        ("replaced", "the rows of expert 2 replace what was summed before"),
        ("other-input", "expert 2: what is mixed is not the output of an expert of that router"),
    ],
)
def test_what_is_no_whole_loop_declines(combine, broken, reason):
    if combine == "loop-flat" and broken in ("other-share", "other-rows"):
        reason = "expert 2 of 4 is missing"  # the index is not as large as the rows then
    assert_declines(Spelling(combine=combine, broken=broken, **LOOP), reason)


@pytest.mark.parametrize("combine", ["mask-sum", "slots", "terms-per-slot", "loop"])
@pytest.mark.parametrize("rank", [2, 3])
def test_what_a_sum_starts_from_is_added_behind(combine, rank):
    if combine == "loop" and rank == 3:
        return  # a loop takes rows of [T, H]
    model = fused(Spelling(combine=combine, rank=rank, broken="other-seed", **LOOP))
    assert operators(model) - Counter(Reshape=1) == {"MatMul": 1, "MoE": 1, "Add": 1, "Identity": 1}


def test_what_a_sum_starts_from_must_be_as_large_as_it():
    assert_declines(
        Spelling(combine="mask-sum", broken="wide-seed", **LOOP),
        "what a sum of experts is added to is not as large as it",
    )
