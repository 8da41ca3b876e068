"""fuse-experts: every activation that an operator has, and factors of halves, which round."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from block_models import ACTIVATIONS, ON_CUDA, Spelling, block_model
from test_fuse_experts import BOUND, FUSE, MODELS, attributes, feeds, fuse, fused, operators, relative

from rewriter.operators.activation import ACTIVATIONS as KNOWN
from rewriter.operators.activation import Activation
from rewriter.parity import apart, sessions
from rewriter.parity.runtime import OrtRuntime, ReferenceRuntime
from rewriter.target import Target


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("combine", ["mask-sum", "dense"])
def test_every_activation(activation, combine):
    own = attributes(fused(Spelling(activation=activation, combine=combine, bias=True)))
    if activation.startswith("clamped"):
        constants = [own[name] for name in ("activation_alpha", "activation_beta", "swiglu_limit")]
        assert np.allclose(constants, [1.702, 1.0, 0.7])
    plain = {"silu": b"silu", "quick": b"silu", "relu": b"relu", "gelu": b"gelu", "plain": b"identity"}
    assert own["activation_type"] == plain.get(activation.partition("-")[0], b"swiglu")


@pytest.mark.parametrize("activation", ON_CUDA)
@pytest.mark.parametrize("combine", ["mask-sum", "chosen"])
def test_activations_that_only_cuda_has(activation, combine):
    how = Spelling(activation=activation, combine=combine, bias=True)
    model = block_model(how)
    result = fuse(model, target="cuda@1.32")
    assert result.report.applied == {FUSE: 1}, result.report.declined
    assert attributes(result.model)["activation_type"] == ON_CUDA[activation].encode()
    assert attributes(result.model).get("swiglu_fusion", 0) == int(activation.startswith("geglu"))
    expected = OrtRuntime().run(model, feeds(how))["y"]
    assert relative(expected, ReferenceRuntime().run(result.model, feeds(how))["y"]) < BOUND["float32"]
    for target in ("cpu@1.32", "cuda@1.31"):
        (reason,) = (reason for _, reason in fuse(model, target=target).report.declined)
        assert f"MoE on target {target}: activation '{ON_CUDA[activation]}' has no kernel" in reason


def test_gemma_4_becomes_qmoe_where_the_target_has_geglu():
    """Its experts are gated by gelu, and its router has a factor for each of them."""
    how = Spelling(activation="geglu", router="table", dtype="float16", hidden=64, inter=64, rank=3)
    model = block_model(how)
    result = fuse(model, "moe-int4", target="cuda:sm90@1.32")
    (node,) = (n for n in result.model.graph.node if n.op_type == "QMoE")
    own = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert (own["activation_type"], own["swiglu_fusion"]) == (b"geglu", 1) and "activation_alpha" not in own
    assert {proof.runtime for proof in result.report.proofs} == {"reference"}
    expected, actual = OrtRuntime().run(model, feeds(how))["y"], ReferenceRuntime().run(result.model, feeds(how))["y"]
    assert np.linalg.norm(actual - expected.astype(float)) < 0.2 * np.linalg.norm(expected.astype(float))
    older = fuse(model, "moe-int4", target="cuda:sm90@1.31")
    assert operators(older.model)["MatMulNBits"] == 8


@pytest.mark.parametrize("router", ["table", "scaled"])
def test_factors_of_halves_go_into_weights_that_are_quantized_next(router):
    how = Spelling(router=router, dtype="float16", hidden=32, inter=32)
    model = block_model(how)
    result = fuse(model, "moe-int4", target="cpu")
    assert operators(result.model)["QMoE"] == 1 and not operators(result.model)["Mul"]
    expected, actual = (OrtRuntime().run(m, feeds(how))["y"] for m in (model, result.model))
    error = np.linalg.norm(actual - expected.astype(float)) / np.linalg.norm(expected.astype(float))
    assert error < 0.15  # without the factors it is 0.26 and 0.60
    for other, rules in ((how, FUSE), (replace(how, bias=True), "moe-int4")):  # elsewhere the weights are given
        found = operators(fuse(block_model(other), rules, target="cpu").model)
        assert found["QMoE"] + found["MoE"] == found["Log"] == 1


def test_a_real_block_of_halves_with_a_factor_for_each_expert_becomes_qmoe():
    path = MODELS / "mobius/gemma4_static_unroll_pr324_f16.onnx"
    result = fuse(path, "moe-int4", target="cpu", overrides={"parity.local": "all"})
    assert result.report.applied[FUSE] == result.report.applied["moe-to-qmoe"] == 2
    assert all(proof.runtime == "cpu" and proof.max_relative < 1e-3 for proof in result.report.proofs)
    assert fuse(path).report.applied == {FUSE: 2}


def test_a_new_gated_activation_is_one_record(monkeypatch, request):
    """Recogniser, definition and targets' reasons know it by that. No runtime has it, so that it is not shipped."""
    model = block_model(how := Spelling(activation="reglu", bias=True))
    (before,) = (reason for _, reason in fuse(model, target="cuda@1.32").report.declined)
    assert "MoE has no activation relu(linear) * linear2" in before
    record = Activation("reglu", lambda x: np.maximum(x, np.float32(0)), ((("relu",),),), gated=True, fusions=(1, 2))
    KNOWN.append(record)
    request.addfinalizer(lambda: KNOWN.remove(record))
    (known,) = (reason for _, reason in fuse(model, target="cuda@1.32").report.declined)
    assert "MoE on target cuda@1.32: activation 'reglu' has no kernel" in known
    shipped = Target.kernels

    def kernels(target, operator):
        found = shipped(target, operator)
        own = target.provider == "cuda"
        return tuple(replace(k, activations=(*k.activations, "reglu")) for k in found) if own else found

    monkeypatch.setattr(Target, "kernels", kernels)
    monkeypatch.setattr(apart, "call", lambda name, *given, timeout: getattr(sessions, name)(*given))
    result = fuse(model, target="cuda@1.32")
    assert result.report.applied == {FUSE: 1}, result.report.declined
    assert attributes(result.model)["activation_type"] == b"reglu"
    assert {proof.runtime for proof in result.report.proofs} == {"reference"}
    expected = OrtRuntime().run(model, feeds(how))["y"]
    assert relative(expected, ReferenceRuntime().run(result.model, feeds(how))["y"]) < BOUND["float32"]
