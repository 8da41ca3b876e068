"""fuse-experts on the layers of the public strategies: every way to put experts together, and near misses of each."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given

import rewriter
from rewriter.parity.runtime import OrtRuntime
from rewriter.testing import check_model, moe_models
from rewriter.testing.draw.blocks import ROUTERS, Block, write_block
from rewriter.testing.draw.combines import COMBINES, LOOPS, MISTAKES
from rewriter.testing.draw.graph import Scope, floats
from rewriter.testing.draw.placements import finish


def layer(combine: str, router: str = "softmax-topk", mistake: str = "", opset: int = 21, k: int = 2) -> ir.Model:
    scope = Scope(opset)
    scope.inputs["x"] = floats("x", "float32", ["T", 8])
    block = Block(4, k, 8, 6, "float32", router, packed=False, combine=combine, mistake=mistake)
    out = write_block(scope, "x", block, "")
    return finish(scope, out, "float32", ["T", 8], overridable=(), typed=True, named=True)


def assert_fused(model: ir.Model) -> None:
    """Fused, and the same on few tokens, so that some experts have none."""
    original = ir.to_proto(model)
    result = rewriter.apply(model, ["fuse-experts"])
    assert result.report.applied == {"fuse-experts": 1}, result.report.declined
    x = {"x": np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)}
    before, after = (OrtRuntime().run(m, x) for m in (original, ir.to_proto(result.ir_model)))
    for name in before:
        np.testing.assert_allclose(after[name], before[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("combine", COMBINES)
def test_every_way_to_put_experts_together_becomes_one_moe(combine):
    assert_fused(layer(combine))


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_that_is_drawn_is_known(router):
    assert_fused(layer("loop-in-place", router))


@pytest.mark.parametrize("combine", LOOPS)
def test_one_expert_for_each_token(combine):
    assert_fused(layer(combine, k=1, opset=18))


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("combine", COMBINES)
def test_a_block_that_is_not_whole_stays_with_a_reason(combine, mistake):
    result = rewriter.apply(layer(combine, mistake=mistake), ["fuse-experts"])
    if mistake == "mask-off-by-one":  # then it is a block of other experts, in another order
        assert result.report.applied or result.report.declined
    else:
        assert not result.report.applied
        assert result.report.declined


@given(moe_models(max_experts=3, max_size=6, max_layers=1, obstacles=MISTAKES))
def test_whatever_is_drawn_is_right_or_declined(model):
    check_model(["fuse-experts"], model)
