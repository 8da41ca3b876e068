"""moe-to-qmoe in mxfp4, nvfp4 and 3 bits, and of weights that were trained on a grid: each kept as it was."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from born_models import GPT_OSS, E, H, I, born, with_stacks
from moe_models import (
    attributes_of,
    feeds,
    initializers_of,
    moe_model,
    nodes_of,
    ort,
    reference,
    relative,
    rewrite,
    rule_set,
)

import rewriter
from rewriter.operators.qmoe import LAYOUT_KEY

ROUNDED = {"rounded_activations": True}
"""As the CPU does at 2 bits, and for floats of 4 bits in float32."""
CPU, CUDA, WEBGPU = "cpu@1.32", "cuda@1.31", "webgpu@1.31"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
ROUNDING = {np.dtype(np.float16): 3e-3, np.dtype(np.float32): 1e-2, BFLOAT16: 8e-3}
"""What the runtime's own kernels of codes are off by, at most, of the largest output."""


def kept(grid, dtype, target, rules="moe-int4"):
    """The one QMoE of a model whose experts lie on a grid, what was rewritten, and what made the weights."""
    fc1, fc2 = born(grid, 2 * I, H, dtype, 0), born(grid, H, I, dtype, 1)
    model = with_stacks(fc1[0], fc2[0])
    result = rewrite(model, rules, target, overrides=ROUNDED | {"parity.local": "all"})
    assert result.report.applied == {"moe-to-qmoe": 1}
    (node,) = nodes_of(result.model, "QMoE")
    return node, result, model, (fc1, fc2)


def nibbles(codes):
    return codes[..., 0::2] | codes[..., 1::2] << 4


@pytest.mark.parametrize("grid", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_float_codes_are_kept_and_the_runtime_computes_the_original(grid, dtype):
    node, result, model, made = kept(grid, dtype, CPU)
    own = attributes_of(node)
    assert (own["quant_type"], own["weights_prepacked"]) == ({"mxfp4": b"fp4", "nvfp4": b"nvfp4"}[grid], 1)
    assert {weight.relative_rms for weight in result.report.weights} == {0.0}
    assert {(w.algorithm, w.bits, w.format) for w in result.report.weights} == {("lossless", 4, grid)}
    arrays = initializers_of(result.model)
    for slot, (_, codes, scales) in zip((2, 5), made, strict=True):
        np.testing.assert_array_equal(arrays[node.input[slot]], nibbles(codes))
        stored = arrays[node.input[slot + 1]].astype(np.float64)
        global_scale = arrays[node.input[15 + (slot == 5)]]
        assert global_scale.shape == (E,) and global_scale.dtype == np.float32
        np.testing.assert_array_equal(stored * global_scale[:, None, None], scales)
    inputs = feeds(dtype, hidden=H, experts=E)
    expected = reference(model, inputs)
    np.testing.assert_array_equal(reference(result.model, inputs), expected)
    assert relative(ort(result.model, inputs), expected) < ROUNDING[dtype]
    onnx.checker.check_model(result.model)


@pytest.mark.parametrize("grid", ["mxfp4", "nvfp4"])
def test_cuda_gets_float_codes_by_columns(grid):
    node, result, _, made = kept(grid, np.float16, CUDA)
    arrays, own = initializers_of(result.model), attributes_of(node)
    assert own["weights_prepacked"] == 0 and own["block_size"] == (32 if grid == "mxfp4" else 16)
    assert {p.key: p.value for p in node.metadata_props}[LAYOUT_KEY] == "columns"
    for slot, (_, codes, scales) in zip((2, 5), made, strict=True):
        np.testing.assert_array_equal(arrays[node.input[slot]], nibbles(codes.transpose(0, 2, 1)))
        if grid == "mxfp4":
            exponents = (np.log2(scales) + 127).astype(np.uint8)
            np.testing.assert_array_equal(arrays[node.input[slot + 1]].view(np.uint8), exponents)


def test_mxfp4_is_eight_bits_without_error_where_the_target_lacks_it():
    node, result, model, _ = kept("mxfp4", np.float16, WEBGPU)
    own = attributes_of(node)
    assert own["expert_weight_bits"] == 8 and "quant_type" not in own
    assert {weight.relative_rms for weight in result.report.weights} == {0.0}
    inputs = feeds(np.float16, hidden=H, experts=E)
    np.testing.assert_array_equal(reference(result.model, inputs), reference(model, inputs))


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("bits", [2, 4])
def test_integers_keep_their_codes(bits, dtype):
    target = CPU if dtype != BFLOAT16 else CUDA
    fc1, fc2 = born(bits, 2 * I, H, dtype, 0), born(bits, H, I, dtype, 1)
    result = rewrite(with_stacks(fc1[0], fc2[0]), "moe-int4", target, overrides=ROUNDED)
    (node,) = nodes_of(result.model, "QMoE")
    assert attributes_of(node)["expert_weight_bits"] == bits
    assert {weight.algorithm for weight in result.report.weights} == {"lossless"}
    arrays = initializers_of(result.model)
    for slot, (_, codes, scales) in zip((3, 6), (fc1, fc2), strict=True):
        np.testing.assert_array_equal(arrays[node.input[slot]], scales)
        if {p.key: p.value for p in node.metadata_props}[LAYOUT_KEY] == "raw" and bits == 4:
            np.testing.assert_array_equal(arrays[node.input[slot - 1]], nibbles(codes))


def threes(packed, k):
    """Codes of 3 bits, the least significant first, from the bits themselves."""
    bits = np.unpackbits(packed, axis=-1, bitorder="little")[..., : 3 * k].reshape(*packed.shape[:-1], k, 3)
    return bits @ np.array([1, 2, 4], np.uint8)


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16])
def test_three_bits_keep_their_codes_and_the_runtime_computes_them(dtype):
    node, result, model, made = kept(3, dtype, CPU)
    assert attributes_of(node)["expert_weight_bits"] == 3
    assert {(w.algorithm, w.bits) for w in result.report.weights} == {("lossless", 3)}
    arrays = initializers_of(result.model)
    for slot, (weight, codes, scales) in zip((2, 5), made, strict=True):
        np.testing.assert_array_equal(threes(arrays[node.input[slot]], weight.shape[-1]), codes)
        np.testing.assert_array_equal(arrays[node.input[slot + 1]], scales)
    inputs = feeds(dtype, hidden=H, experts=E)
    assert relative(ort(result.model, inputs), reference(model, inputs)) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16])
def test_three_bits_that_need_a_negative_scale_are_kept_in_four(dtype):
    fc1, fc2 = born(3, 2 * I, H, dtype, 0), born(3, H, I, dtype, 1)
    fc1[0][2, 5, :32] *= -1  # from -3 to 4 times the scale
    result = rewrite(with_stacks(fc1[0], fc2[0]), "moe-int4", CPU)
    (node,) = nodes_of(result.model, "QMoE")
    assert attributes_of(node)["expert_weight_bits"] == 4
    assert {w.algorithm for w in result.report.weights} == {"lossless"}


def test_one_expert_off_the_grid_leaves_all_to_the_next_algorithm():
    fc1, fc2 = born("mxfp4", 2 * I, H, np.float16, 0)[0], born("mxfp4", H, I, np.float16, 1)[0]
    fc1[E - 1, 2 * I - 2, 40] = 0.0123
    result = rewrite(with_stacks(fc1, fc2), "moe-int4", CPU)
    (node,) = nodes_of(result.model, "QMoE")
    assert "quant_type" not in attributes_of(node)
    assert {(w.algorithm, w.bits, w.format) for w in result.report.weights} == {("mse-search", 4, "int")}


def test_lossless_alone_leaves_an_ordinary_weight_in_float():
    model = moe_model(GPT_OSS, dtype=np.float16, hidden=H, inter=I, experts=E)
    result = rewrite(model, rule_set(["moe-to-qmoe"], algorithm="lossless"), CPU)
    assert not result.report.applied
    assert "the weights lie on no grid that a kernel of the target runs" in result.report.declines[0].reason


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16])
@pytest.mark.parametrize(
    ("rules", "format_", "bits"), [("moe-mxfp4", "mxfp4", 4), ("moe-nvfp4", "nvfp4", 4), ("moe-int3", "int", 3)]
)
def test_weights_that_were_not_trained_so(rules, format_, bits, dtype):
    model = moe_model(GPT_OSS, dtype=dtype, hidden=H, inter=I, experts=E)
    result = rewrite(model, rules, CPU, overrides={"parity.local": "all"})
    assert result.report.applied == {"moe-to-qmoe": 1}
    assert {(w.algorithm, w.bits, w.format) for w in result.report.weights} == {("mse-search", bits, format_)}
    inputs = feeds(dtype, hidden=H, experts=E)
    assert relative(ort(result.model, inputs), reference(result.model, inputs)) < ROUNDING[dtype]


@pytest.mark.parametrize(
    ("rules", "target", "dtype", "reason"),
    [
        ("moe-mxfp4", "cpu@1.31", np.float16, "it runs int, not mxfp4"),
        ("moe-nvfp4", "webgpu@1.31", np.float16, "it runs int, not nvfp4"),
        ("moe-int3", "cpu@1.32", np.float32, "bits, not 3"),
        ("moe-int3", "cuda@1.31", np.float16, "bits, not 3"),
    ],
)
def test_a_target_without_the_format_says_so(rules, target, dtype, reason):
    model = moe_model(GPT_OSS, dtype=dtype, hidden=H, inter=I, experts=E)
    result = rewrite(model, rules, target)
    assert not nodes_of(result.model, "QMoE")
    assert any(reason in decline.reason for decline in result.report.declines), result.report.declines


@pytest.mark.parametrize("grid", ["mxfp4", "nvfp4"])
def test_float_codes_go_from_one_provider_to_the_other_and_back_to_floats(grid):
    _, result, model, made = kept(grid, np.float16, CUDA)
    back = rewrite(result.model, rule_set(["qmoe-layout"]), CPU)
    assert back.report.applied == {"qmoe-layout": 1}
    direct, _, _, _ = kept(grid, np.float16, CPU)
    (node,) = nodes_of(back.model, "QMoE")
    assert attributes_of(node) == attributes_of(direct)
    inputs = feeds(np.float16, hidden=H, experts=E)
    assert relative(ort(back.model, inputs), reference(model, inputs)) < 2e-3
    floats = rewrite(back.model, rule_set(["qmoe-to-moe"]), CPU)
    (moe,) = nodes_of(floats.model, "MoE")
    for slot, (weight, _, _) in zip((2, 4), made, strict=True):
        np.testing.assert_array_equal(initializers_of(floats.model)[moe.input[slot]], weight)


def test_inspect_says_what_float_weights_were_trained_as():
    fc1, fc2 = born("mxfp4", 2 * I, H, np.float16, 0)[0], born("mxfp4", H, I, np.float16, 1)[0]
    info = rewriter.inspect(with_stacks(fc1, fc2))
    (experts,) = [holding for holding in info.weights if holding.role == "expert" and holding.kind == "float"]
    assert experts.stored == "FLOAT16, on a grid of mxfp4: 4.25 bits without loss"
    plain = rewriter.inspect(moe_model(GPT_OSS, dtype=np.float16, hidden=H, inter=I, experts=E))
    (experts,) = [holding for holding in plain.weights if holding.role == "expert" and holding.kind == "float"]
    assert experts.stored == "FLOAT16"


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("format_", ["mxfp4", "nvfp4"])
def test_a_kernel_that_rounds_more_than_a_proof_allows_is_no_judge(format_, dtype):
    """The CPU's own of 1.32 is 5e-3 off in float32 and up to 2e-3 in float16: a right rewrite failed by it."""
    model = moe_model(GPT_OSS, dtype=dtype, hidden=128, inter=128, experts=4)
    result = rewrite(model, rule_set(["moe-to-qmoe"], format=format_), "cpu@1.32")
    (proof,) = result.report.proofs
    assert proof.runtime == "reference" and "rounds" in proof.because


@pytest.mark.parametrize(("rules", "bits"), [("moe-mxfp4", 4.25), ("moe-nvfp4", 4.5), ("moe-int3", 3.5)])
def test_sizes_are_foretold_and_weights_read_back_in_every_format(rules, bits):
    model = moe_model(GPT_OSS, dtype=np.float16, hidden=H, inter=I, experts=E)
    foretold = rewriter.explain(model, rules=rules, target=CPU)
    result = rewrite(model, rules, CPU)
    written = result.model
    done = result.report
    assert foretold.bytes_after == done.bytes_after
    assert {w.name: w.bytes_after for w in foretold.weights} == {w.name: w.bytes_after for w in done.weights}
    assert {w.role for w in done.weights} == {"expert.gate_up", "expert.down"}
    for summary in done.by_role:  # a global scale is one number for each expert
        assert bits <= summary.bits_per_element < bits + 0.01
    (held,) = [h for h in rewriter.inspect(written).weights if h.kind == "quantized"]
    assert (held.role, held.stored) == ("expert", f"{int(bits)} bits, QMoE")
    assert held.elements == 3 * E * H * I

    back = rewrite(written, rule_set(["qmoe-to-moe"]), CPU).model
    again = rewrite(back, rules, CPU)
    (moe,) = nodes_of(back, "MoE")
    stacks = [initializers_of(back)[moe.input[slot]] for slot in (2, 4)]
    errors = {w.name.rpartition("__")[0]: w.relative_rms for w in done.weights}
    assert len(errors) == 2 and min(errors.values()) > 0.05
    for stack, original in zip(stacks, ("layer0.fc1", "layer0.fc2"), strict=True):
        difference = stack.astype(float) - initializers_of(model)[original].astype(float)
        rms = np.sqrt((difference**2).sum() / (initializers_of(model)[original].astype(float) ** 2).sum())
        assert rms == pytest.approx(np.mean([w.relative_rms for w in done.weights if original in w.name]), rel=0.02)
    assert again.report.applied == {"moe-to-qmoe": 1}
