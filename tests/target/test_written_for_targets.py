"""What is written for a target runs there as it is meant: cells that the tables once had wrong, each by a rewrite."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "rules"))

from block_models import Spelling, block_model
from linear_models import linear_model
from moe_models import INTERLEAVED, NORMALISE, attributes_of, moe_model, nodes_of, rewrite, rule_set

import rewriter
from rewriter.html import page
from rewriter.operators.form import ExpertForm
from rewriter.target import Target

CUDA = "cuda@1.31"


def stamp_of(node):
    return {p.key: p.value for p in node.metadata_props}["rewriter.layout"]


def written(model, target=CUDA, **plan):
    """The QMoE that moe-to-qmoe writes, and why it did not."""
    more = plan.pop("more", {})
    rules = rule_set(["moe-to-qmoe"], **plan)
    rules["quantization"] |= more
    result = rewrite(model, rules, target)
    return nodes_of(result.model, "QMoE"), [decline.reason for decline in result.report.declines]


def halves(attributes=INTERLEAVED, **sizes):
    return moe_model(attributes, dtype=np.float16, **{"hidden": 128, "inter": 128, "experts": 4, **sizes})


@pytest.mark.parametrize("sizes", [{"hidden": 192, "inter": 192}, {"hidden": 128, "inter": 64}])
def test_zero_points_of_four_bits_fill_their_bytes_on_cuda(sizes):
    """CUDA reads garbage where a row has an odd number of them, as of 2880 features in blocks of 64."""
    ((node,), _) = written(halves(**sizes), bits=4, block_size=64, symmetric=False)
    assert attributes_of(node)["block_size"] == 32 and node.input[11] and node.input[12]
    ((node,), _) = written(halves(**sizes), bits=8, block_size=64, symmetric=False)
    assert attributes_of(node)["block_size"] == 64


def test_unnormalised_routing_is_the_attribute_on_cuda():
    """CUDA ignores router_weights, and heeds normalize_routing_weights=0."""
    ((node,), _) = written(halves(INTERLEAVED | {"normalize_routing_weights": 0}), bits=4)
    assert attributes_of(node)["normalize_routing_weights"] == 0 and len(node.input) <= 14


def test_the_sparse_mixer_is_left_to_moe_on_cuda():
    """CUDA's MoE heeds it, its QMoE ignores it."""
    nodes, reasons = written(halves({"activation_type": "relu", "use_sparse_mixer": 1, "k": 2}, experts=8), bits=4)
    assert not nodes and any("use_sparse_mixer has no kernel" in reason for reason in reasons)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("target", ["cuda@1.31", "cuda@1.28"])
def test_weights_for_cuda_are_prepacked(target, bits):
    """A raw weight is packed as it is loaded, and both copies stay in the memory of the GPU."""
    ((node,), _) = written(halves(), target, bits=bits)
    assert stamp_of(node) == "cutlass-sm80" and attributes_of(node)["weights_prepacked"] == 1


@pytest.mark.parametrize("symmetric", [True, False])
def test_two_bits_on_cuda(symmetric):
    ((node,), _) = written(halves(hidden=96, inter=96), bits=2, symmetric=symmetric)
    assert stamp_of(node) == "raw" and attributes_of(node)["expert_weight_bits"] == 2


@pytest.mark.parametrize("symmetric", [True, False])
def test_projections_of_different_bits_on_cuda(symmetric):
    """Zero points beside different widths were never measured: none are written."""
    more = {"overrides": [{"role": "expert.down", "bits": 8}]}
    ((node,), _) = written(halves(), bits=4, symmetric=symmetric, more=more)
    own = attributes_of(node)
    assert (own["expert_weight_bits"], own["fc2_expert_weight_bits"]) == (4, 8) and stamp_of(node) == "raw"
    assert len(node.input) <= 11


def test_sizes_that_cuda_does_not_tile_stay_float():
    nodes, reasons = written(halves(hidden=96, inter=96), bits=4)
    assert not nodes and any("K = 96 is not a multiple of 64" in reason for reason in reasons)


def test_float32_falls_off_cuda():
    nodes, reasons = written(moe_model(INTERLEAVED), bits=4)
    assert not nodes and any("float has no kernel" in reason for reason in reasons)


def test_one_projection_with_zero_points_before_1_31_on_the_cpu():
    """Of 4 bits it is 2 to 8 % off, and 1 to 6 % of whole rows still."""
    more = {"overrides": [{"role": "expert.down", "symmetric": False}]}
    model = moe_model(INTERLEAVED, hidden=128, inter=128)
    for target, block, runs in (("cpu@1.30", 32, False), ("cpu@1.31", 32, True), ("cpu@1.31", 0, False)):
        nodes, reasons = written(model, target, bits=4, block_size=block, more=more)
        assert bool(nodes) == runs and (runs or any("for all projections or for none" in r for r in reasons))


UNNORMALISED = {"activation_type": "swiglu", "swiglu_fusion": 2, "k": 2, "normalize_routing_weights": 0}


@pytest.mark.parametrize("attributes", [UNNORMALISED, {"activation_type": "silu", "k": 2}])
def test_what_fails_loudly_does_not_become_what_is_wrong(attributes):
    """Before 1.25 neither MoE nor QMoE of the CPU keeps weights that are not normalised."""
    model = moe_model(attributes, fc3="swiglu_fusion" not in attributes, bias="none")
    result = rewrite(model, rule_set(NORMALISE), "cpu@1.24")
    assert not result.report.applied
    assert "normalize_routing_weights=0 is not heeded in float" in result.report.declines[0].reason


def test_a_node_that_the_target_computes_wrongly_is_named():
    """On the way to QMoE an MoE may be one that only QMoE runs; where it stays, the report says so."""
    model = moe_model(UNNORMALISED, bias="none")
    (misfit,) = rewrite(model, rule_set(NORMALISE), "cpu@1.31").report.misfits
    assert misfit.reason == "MoE on cpu@1.31: normalize_routing_weights=0 is not heeded in float"
    assert not rewrite(model, rule_set(NORMALISE, ["moe-to-qmoe"], bits=4), "cpu@1.31").report.misfits
    assert not rewrite(model, rule_set(NORMALISE), "cpu@1.32").report.misfits


def test_a_models_own_node_is_named_too():
    """CUDA ignores router_weights, whoever wrote them."""
    model = rewrite(
        moe_model(UNNORMALISED, bias="none", dtype=np.float16), rule_set(NORMALISE, ["moe-to-qmoe"], bits=4)
    )
    (misfit,) = rewrite(model.model, rule_set(["unstack"]), CUDA).report.misfits
    assert "router_weights are not heeded" in misfit.reason


def changes(model, target=CUDA, **plan):
    more = plan.pop("more", {})
    rules = rule_set(["moe-to-qmoe"], **plan)
    rules["quantization"] |= more
    result = rewrite(model, rules, target)
    assert result.model.ByteSize()
    return result.report


def test_what_was_written_in_place_of_the_plan_is_said(tmp_path):
    sizes = {"hidden": 192, "inter": 192}
    report = changes(halves(**sizes), bits=4, block_size=64, symmetric=False)
    assert {str(change) for change in report.changes} == {
        "4 bits in blocks of 64, asymmetric -> 4 bits in blocks of 32, asymmetric:"
        " the target misreads 3 zero points of 4 bits, which end within a byte"
    }
    assert sum(len(change.weights) for change in report.changes) == 8
    more = {"overrides": [{"role": "expert.down", "bits": 8}]}
    report = changes(halves(**sizes), bits=4, symmetric=False, more=more)
    assert {str(change) for change in report.changes} == {
        f"{bits} bits in blocks of 32, asymmetric -> {bits} bits in blocks of 32, symmetric:"
        " the target takes no zero points where projections have different bits"
        for bits in (4, 8)
    }
    written = {w["planned_form"]: w["because"] for w in report.to_json()["weights"]}
    assert written["8 bits in blocks of 32, asymmetric"].startswith("the target takes no zero points")
    assert "zero points where projections have different bits" in page(report)
    assert not changes(halves(), bits=4).changes


def test_one_block_size_for_all_projections_is_said():
    more = {"overrides": [{"role": "expert.down", "block_size": 64}]}
    (change,) = changes(halves(), bits=4, more=more).changes
    assert (change.role, change.because) == ("expert.down", "QMoE has one block size for all projections")


def test_no_moe_is_written_for_webgpu():
    """Its kernel is registered, and returns an error when it runs."""
    result = rewrite(moe_model(UNNORMALISED | {"normalize_routing_weights": 1}), rule_set(["unstack"]), "webgpu@1.32")
    (misfit,) = result.report.misfits
    assert misfit.reason == "MoE on webgpu@1.32: it has no MoE"
    ((node,), _) = written(halves(), "webgpu@1.32", bits=4)
    assert stamp_of(node) == "raw"


@pytest.mark.parametrize("router", ["biased", "late", "masked"])
def test_weights_that_are_no_softmax_are_given_by_logarithms_on_cuda(router):
    """Slot 14 is ignored there; in halves the logarithms are taken in float32 and their sum is outside."""
    how = Spelling(router=router, weights="own", hidden=64, inter=64, dtype="float16")
    result = rewriter.apply(block_model(how), "moe-int4", target=CUDA)
    ((node,), logits) = nodes_of(result.model, "QMoE"), nodes_of(result.model, "Log")
    assert len(node.input) <= 14 and logits and not result.report.misfits
    assert all(proof.max_relative <= proof.tolerance for proof in result.report.proofs)


def test_k_quant_mixed_keeps_one_qmoe_on_cuda():
    how = Spelling(weights="own", hidden=128, inter=128, dtype="float16")
    result = rewriter.apply(block_model(how), "k-quant-mixed", target=CUDA)
    ((node,), linears) = nodes_of(result.model, "QMoE"), nodes_of(result.model, "MatMulNBits")
    own = attributes_of(node)
    assert (own["expert_weight_bits"], own["fc2_expert_weight_bits"]) == (4, 8) and not linears
    assert all("symmetric: the target takes no zero points" in str(change) for change in result.report.changes)


def linear(target, *, bias=False, **plan):
    """The nodes of a linear in float16 that was rewritten for a target, and why it was not."""
    values = {"w": np.ones((512, 32), np.float16)} | ({"c": np.ones(32, np.float16)} if bias else {})
    model = linear_model("y = Gemm(x, w, c)" if bias else "y = MatMul(x, w)", values, x=("T", 512), dtype="float16")
    overrides = {f"quantization.default.{name}": value for name, value in plan.items()}
    result = rewriter.apply(model, "dense-int4", target=target, overrides=overrides)
    return list(result.ir_model.graph), [decline.reason for decline in result.report.declines]


def test_four_bits_in_blocks_of_256_stay_float_on_cuda():
    """The first decoded token fails there."""
    ((node,), reasons) = linear(CUDA, bits=4, block_size=256)
    assert node.op_type == "MatMul"
    assert "4 bits in blocks of 256 have no kernel (it runs 16, 32, 64, 128)" in reasons[-1]
    for target, bits in (("cpu", 4), (CUDA, 8)):
        ((node,), _) = linear(target, bits=bits, block_size=256)
        assert node.op_type == "MatMulNBits"


def test_the_bias_of_a_linear_is_its_slot_on_cuda():
    ((node,), _) = linear(CUDA, bias=True)
    assert node.op_type == "MatMulNBits" and node.inputs[5] is not None


@pytest.mark.parametrize("activation", ["silu", "swiglu"])
def test_fc3_becomes_one_interleaved_half_on_cuda(activation):
    """CUDA's MoE loads an fc3 and computes something else."""
    attributes = {"activation_type": activation, "k": 2, "normalize_routing_weights": 1}
    model = moe_model(attributes, fc3=True, dtype=np.float16, bias="none")
    (misfit,) = rewrite(model, rule_set(["unstack"]), CUDA).report.misfits
    assert f"fc3 beside '{activation}' has no kernel" in misfit.reason
    result = rewrite(model, rule_set(NORMALISE), CUDA)
    (node,) = nodes_of(result.model, "MoE")
    assert not result.report.misfits and attributes_of(node)["swiglu_fusion"] == 1 and len(node.input) <= 6


def test_the_cpu_reads_the_bytes_of_cuda_by_a_kernel_that_does_not_normalise_router_weights():
    """1.32 runs sm80's layout beside raw weights, 3 bits and floats of 4 bits; in bfloat16 nothing else."""
    target = Target.parse("cpu@1.32")
    form = ExpertForm(k=2, activation="swiglu", fusion=1, normalize=True)
    refused = target.kernels("QMoE")[1].refusal(form, "BFLOAT16", weighted=True)
    assert refused == "router_weights are not heeded at normalize_routing_weights=1"
    assert not isinstance(target.runs("QMoE", replace(form, normalize=False), "BFLOAT16", weighted=True), str)
    packed = {
        own.format: own.blocks for own in target.kernels("QMoE") if "raw" not in own.layouts or own.format != "int"
    }
    assert packed == {"int": {4: (32, 64, 128)}, "mxfp4": {4: (32,)}, "nvfp4": {4: (16,)}}
    model = moe_model(INTERLEAVED, dtype=ml_dtypes.bfloat16, hidden=128, inter=128)
    ((node,), _) = written(model, "cpu@1.32", bits=4)
    assert stamp_of(node) == "cutlass-sm80"
    ((node,), _) = written(model, "cuda:sm80@1.32", bits=4)
    assert stamp_of(node) == "cutlass-sm80"


@pytest.mark.parametrize(("target", "dtype", "runs"), [(CUDA, "float16", True), ("cuda@1.30", "float16", False)])
def test_two_bits_in_a_linear_on_cuda(target, dtype, runs):
    model = linear_model("y = MatMul(x, w)", {"w": np.ones((64, 32), dtype)}, x=("T", 64), dtype=dtype)
    result = rewriter.apply(model, "dense-int4", target=target, overrides={"quantization.default.bits": 2})
    assert sum(node.op_type == "MatMulNBits" for node in result.model.graph) == runs
    assert runs or "2 bits have no kernel in float16 (it runs 4, 8)" in result.report.declines[-1].reason
