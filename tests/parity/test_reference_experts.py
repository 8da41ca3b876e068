"""The reference MoE and QMoE against ONNX Runtime's CPU provider, or against their form that the provider can run."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_models import (
    assert_agree,
    quantized,
    random_moe,
    reference,
    relative_error,
    runtime,
)

from rewriter.errors import ModelError, TargetError
from rewriter.operators.qmoe import LAYOUTS, RAW

FEEDS = ("x", "router")
DTYPES = [np.float32, np.float16]
SWIGLU = {"activation_type": "swiglu", "activation_alpha": 1.702, "activation_beta": 1.0, "swiglu_limit": 1.5}
ACTIVATIONS = [{"activation_type": name} for name in ("relu", "gelu", "silu", "identity")] + [
    SWIGLU | {"swiglu_fusion": 1},
    {"activation_type": "swiglu", "swiglu_fusion": 1},
    {"activation_type": "swiglu", "swiglu_fusion": 1, "swiglu_limit": float("inf")},
]


def ids(value):
    return "-".join(str(v) for v in value.values()) if isinstance(value, dict) else None


# MoE


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=ids)
def test_moe(activation, bias, dtype):
    for lead, k in itertools.product(((5,), (2, 3)), (1, 3, 8)):
        moe = random_moe(lead=lead, bias=bias, gated="swiglu_fusion" in activation, dtype=dtype)
        assert_agree("MoE", moe, FEEDS, activation | {"k": k, "normalize_routing_weights": 1})
        # ONNX Runtime 1.31.1's float16 MoE takes x for zero without normalisation; there float32 alone is the judge.
        if dtype is np.float32:
            assert_agree("MoE", moe, FEEDS, activation | {"k": k, "normalize_routing_weights": 0})


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


ON_CUDA = {
    "relu2": ({"activation_type": "relu2"}, lambda h: np.maximum(h, 0) ** 2),
    "geglu-1": ({"activation_type": "geglu", "swiglu_fusion": 1}, lambda h: gelu(h[0::2]) * h[1::2]),
    "geglu-2": ({"activation_type": "geglu", "swiglu_fusion": 2}, lambda h: gelu(h[: h.size // 2]) * h[h.size // 2 :]),
}


@pytest.mark.parametrize("name", ON_CUDA)
def test_activations_that_only_cuda_runs(name):
    attributes, activate = ON_CUDA[name]
    moe = random_moe(bias=False, gated="swiglu_fusion" in attributes)
    ours = reference("MoE", moe, FEEDS, attributes | {"k": 1})
    shares = np.exp(moe["router"]) / np.exp(moe["router"]).sum(axis=-1, keepdims=True)
    expected = np.empty_like(ours)
    for token, expert in enumerate(np.argmax(shares, axis=-1)):
        h = moe["fc1"][expert].astype(np.float64) @ moe["x"][token]
        expected[token] = shares[token, expert] * (moe["fc2"][expert] @ activate(h))
    assert relative_error(ours, expected) < 1e-5


@pytest.mark.parametrize("activation", ACTIVATIONS[:4], ids=ids)
def test_alpha_beta_and_limit_belong_to_swiglu(activation):
    attributes = {"k": 2, "activation_alpha": 1.7, "activation_beta": 0.5, "swiglu_limit": 0.1}
    assert_agree("MoE", random_moe(), FEEDS, activation | attributes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("logits", [[0] * 8, [0, 1, 0, 1, 0, 1, 0, 1], [2, 0, 1, 1, 1, 0, 0, 1]], ids=str)
def test_ties_select_the_experts_that_the_runtime_selects(logits, dtype):
    moe = random_moe(lead=(1,), dtype=dtype) | {"router": np.array([logits], dtype)}
    for k in (1, 2, 3, 5):
        assert_agree("MoE", moe, FEEDS, {"k": k, "normalize_routing_weights": 1})


def interleaved(gate, linear):
    """[E, I, ...] twice to [E, 2 * I, ...], rows in turn."""
    return np.stack((gate, linear), axis=2).reshape(gate.shape[0], -1, *gate.shape[2:])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", ["silu with fc3", "swiglu unfused", "swiglu concatenated"])
def test_gated_forms_equal_the_interleaved_one_that_the_runtime_runs(form, bias):
    moe = random_moe(fc3=True, bias=bias)
    gated = {"activation_type": "swiglu"} if form == "silu with fc3" else SWIGLU
    normal = {**moe, "fc3": None, "fc3_bias": None, "fc1": interleaved(moe["fc1"], moe["fc3"])}
    if bias:
        normal["fc1_bias"] = interleaved(moe["fc1_bias"], moe["fc3_bias"])
    expected = runtime("MoE", normal, FEEDS, gated | {"k": 2, "swiglu_fusion": 1})
    attributes = {"activation_type": "silu"} if form == "silu with fc3" else dict(SWIGLU)
    if form == "swiglu concatenated":
        attributes["swiglu_fusion"] = 2
        joined = np.concatenate((moe["fc1"], moe["fc3"]), axis=1)
        moe = {**moe, "fc1": joined, "fc3": None, "fc3_bias": None}
        if bias:
            moe["fc1_bias"] = np.concatenate((moe["fc1_bias"], normal["fc1_bias"][:, 1::2]), axis=1)
    assert relative_error(reference("MoE", moe, FEEDS, attributes | {"k": 2}), expected) < 1e-5


def test_bfloat16_is_float32_on_the_same_values():
    moe = random_moe(dtype=ml_dtypes.bfloat16)
    wide = {name: None if array is None else array.astype(np.float32) for name, array in moe.items()}
    got = reference("MoE", moe, FEEDS, {"k": 2})
    assert got.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(got, reference("MoE", wide, FEEDS, {"k": 2}).astype(ml_dtypes.bfloat16))


def test_sparse_mixer_weighs_each_choice_among_its_near_ties():
    logits = np.full((3, 8), -10, np.float32)
    logits[0, [1, 4]] = 3, 2.93  # 4 is just beyond 2% of 3: both alone, weight 1 each
    logits[1, [1, 4]] = 3, 2.95  # 4 is near 1; without 1, it is alone
    logits[2, [0, 1, 4]] = 3, 2, 1.99  # 0 is alone; then 1 has 4 near it
    near, nearer = 1 / (1 + np.exp(np.float32(2.95 - 3))), 1 / (1 + np.exp(np.float32(1.99 - 2)))
    experts = np.eye(8, 16, dtype=np.float32)[:, :, None] * np.ones((1, 1, 16), np.float32)
    moe = random_moe(hidden=16, inter=16, lead=(3,), bias=False)
    moe |= {"router": logits, "x": np.ones((3, 16), np.float32) / 16, "fc2": experts}
    moe["fc1"] = np.ones((8, 16, 16), np.float32) / 16
    y = reference("MoE", moe, FEEDS, {"k": 2, "use_sparse_mixer": 1})[:, :8]
    expected = np.zeros((3, 8))
    expected[0, [1, 4]] = 1, 1
    expected[1, [1, 4]] = near, 1
    expected[2, [0, 1]] = 1, nearer
    np.testing.assert_allclose(y, expected, rtol=1e-6)


# QMoE


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "block"), [(2, 0), (2, 32), (4, 0), (4, 16), (4, 32), (8, 0)])
@pytest.mark.parametrize("activation", ACTIVATIONS[:5], ids=ids)
def test_qmoe(activation, bits, block, *, symmetric, dtype):
    moe = random_moe(gated="swiglu_fusion" in activation, dtype=dtype)
    slots, _ = quantized(moe, bits, block, symmetric=symmetric)
    attributes = {"k": 3, "expert_weight_bits": bits, "normalize_routing_weights": 1}
    assert_agree("QMoE", slots, FEEDS, activation | attributes | ({"block_size": block} if block else {}))


QMOE_FORMS = [
    ({"activation_type": "silu"}, {"fc3": True}),
    (SWIGLU, {"fc3": True}),
    (SWIGLU | {"swiglu_fusion": 1}, {"gated": True}),
    (SWIGLU | {"swiglu_fusion": 2}, {"gated": True, "bias": False}),
]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("attributes", "form"), QMOE_FORMS, ids=ids)
@settings(max_examples=12, deadline=None)
@given(
    bits=st.sampled_from([2, 4, 8]),
    block=st.sampled_from([0, 32]),
    layout=st.sampled_from([layout for layout in LAYOUTS if layout.name != "columns"]),  # which is of float codes
    narrow=st.sampled_from([None, 2, 4, 8]),
    dtype=st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
)
def test_qmoe_is_moe_of_its_dequantized_weights(*, attributes, form, symmetric, bits, block, layout, narrow, dtype):
    if 2 in (bits, narrow):
        layout = RAW
    moe = random_moe(inter=64, experts=4, dtype=dtype, **form)
    slots, floats = quantized(moe, bits, block, symmetric=symmetric, layout=layout, narrow=narrow)
    own = {"expert_weight_bits": bits, "weights_prepacked": int(layout is not RAW)}
    own |= {"block_size": block} if block else {}
    own |= {"fc2_expert_weight_bits": narrow} if narrow else {}
    stamp = {"rewriter.layout": layout.name} if layout is not RAW else None
    got = reference("QMoE", slots, FEEDS, attributes | own | {"k": 2}, metadata=stamp)
    expected = reference("MoE", floats, FEEDS, attributes | {"k": 2})
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("normalize", [0, 1])
def test_qmoe_router_weights(normalize):
    slots, _ = quantized(random_moe(), 4, 32)
    slots["router_weights"] = np.random.default_rng(1).random((5, 8), np.float32)
    attributes = {"k": 3, "block_size": 32, "normalize_routing_weights": normalize}
    assert_agree("QMoE", slots, (*FEEDS, "router_weights"), attributes)


def test_the_cpu_providers_qmoe_normalizes_whatever_the_attribute_says():
    """Its MoE and CUDA's QMoE do not: a rewrite for CPU must give the softmax as router_weights instead."""
    slots, floats = quantized(random_moe(), 4, 32)
    attributes = {"k": 3, "block_size": 32}
    theirs = runtime("QMoE", slots, FEEDS, attributes)
    assert relative_error(theirs, reference("QMoE", slots, FEEDS, attributes | {"normalize_routing_weights": 1})) < 1e-5
    exact = reference("QMoE", slots, FEEDS, attributes)
    assert relative_error(exact, runtime("MoE", floats, FEEDS, {"k": 3})) < 1e-5
    assert relative_error(theirs, exact) > 0.1
    softmax = np.exp(slots["router"]) / np.exp(slots["router"]).sum(axis=1, keepdims=True)
    slots["router_weights"] = softmax
    assert relative_error(runtime("QMoE", slots, (*FEEDS, "router_weights"), attributes), exact) < 1e-5


# Refusals


@pytest.mark.parametrize(
    ("attributes", "form", "error", "reason"),
    [
        ({"activation_type": "reglu"}, {}, TargetError, "activation_type 'reglu'"),
        ({"activation_type": "geglu"}, {"fc3": True}, TargetError, "geglu with swiglu_fusion=0"),
        ({"activation_type": "geglu", "swiglu_fusion": 1}, {"fc3": True, "gated": True}, TargetError, "fc3 beside"),
        ({"activation_type": "relu"}, {"fc3": True}, TargetError, "fc3 with activation_type 'relu'"),
        ({"activation_type": "silu", "activation_alpha": 2.0}, {"fc3": True}, TargetError, "silu with fc3 and"),
        ({"activation_type": "swiglu"}, {}, ModelError, "needs fc3"),
        (SWIGLU | {"swiglu_fusion": 1}, {"fc3": True, "gated": True}, TargetError, "fc3 beside swiglu_fusion=1"),
        (SWIGLU | {"swiglu_fusion": 3}, {"gated": True}, TargetError, "swiglu_fusion=3"),
        (SWIGLU | {"swiglu_fusion": 1, "swiglu_limit": -1.0}, {"gated": True}, ModelError, "swiglu_limit=-1"),
        ({"use_sparse_mixer": 1, "k": 1}, {}, TargetError, "sparse mixer"),
        ({"k": 9}, {}, ModelError, "k = 9 of 8 experts"),
        ({"colour": 1}, {}, ModelError, "colour"),
        ({}, {"gated": True}, ModelError, "fc1 has shape"),
    ],
    ids=ids,
)
def test_moe_refuses_what_no_runtime_defines(attributes, form, error, reason):
    with pytest.raises(error, match=reason):
        reference("MoE", random_moe(**form), FEEDS, {"k": 2} | attributes)


@pytest.mark.parametrize(
    ("attributes", "stamp", "error", "reason"),
    [
        ({"quant_type": "fp8"}, None, TargetError, "quant_type 'fp8'"),
        ({"weights_prepacked": 1}, None, TargetError, "which layout"),
        ({"weights_prepacked": 0}, "cutlass-sm80", ModelError, "contradicts"),
        ({"weights_prepacked": 1}, "raw", ModelError, "contradicts"),
        ({}, "cutlass-sm70", ModelError, "unknown weight layout"),
        ({"expert_weight_bits": 8}, None, ModelError, "fc1 codes have shape"),
        ({"block_size": 48}, None, ModelError, "block size 48"),
    ],
    ids=ids,
)
def test_qmoe_refuses(attributes, stamp, error, reason):
    slots, _ = quantized(random_moe(), 4, 32)
    metadata = {"rewriter.layout": stamp} if stamp else None
    with pytest.raises(error, match=reason):
        reference("QMoE", slots, FEEDS, {"k": 2, "block_size": 32} | attributes, metadata=metadata)
