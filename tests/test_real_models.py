"""Models that other people's exporters wrote. MOE_MODELS names a directory with more of them."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support import histogram, rounds_activations

import rewriter
from rewriter.errors import ModelError, TargetError
from rewriter.parity.runtime import OrtRuntime
from rewriter.ruleset import rule_sets
from rewriter.testing.promises.agreement import check_outputs

MODELS = Path(os.environ.get("MOE_MODELS", Path(__file__).parent / "models"))
FILES = sorted(MODELS.rglob("*.onnx"))
INVALID = {"gemma4_fused_moe_pre324_malformed_f32", "gpt_oss_decomposed_dml_fp32"}
VALID = [file for file in FILES if file.stem not in INVALID]
UNROLLED = ("granitemoehybrid_static_unroll_f32", "gemma4_silu_static_unroll_pr324_f32")
ALL = {"parity.local": "all"}
WEIGHT_MOVES = ("Gather", "Squeeze", "Transpose", "Slice", "Split", "SplitToSequence", "GatherND")


def name_of(file):
    return f"{file.parent.name}/{file.stem}"


def find(stem):
    return next(file for file in FILES if file.stem == stem)


def recorded(file):
    """Inputs of a model and what ONNX Runtime returned for them; None where it cannot run the model."""
    path = file.with_suffix(".npz")
    if not path.exists():
        return None
    with np.load(path) as stored:
        arrays = {key: stored[key] for key in stored}
    feeds, expected = ({k[len(p) :]: v for k, v in arrays.items() if k.startswith(p)} for p in ("in:", "out:"))
    if rounds_activations(file):
        here = OrtRuntime().run(file, feeds)
        expected = {name: here[name] for name in expected}
    return feeds, expected


@cache
def applied(stem, rules, *overrides):
    return rewriter.apply(find(stem), rules, overrides={**ALL, **dict(overrides)})


def accepted(proto):
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError:
        return False
    return True


def close(actual, expected, tolerance):
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    wide = expected.astype(np.float64)
    assert np.abs(actual.astype(np.float64) - wide).max(initial=0) <= tolerance * max(np.abs(wide).max(initial=0), 1e-9)


def experts(result):
    """The quantized expert weights, complete once the model has been computed."""
    ir.to_proto(result.model)
    return [weight for weight in result.report.weights if weight.role.startswith("expert.")]


@pytest.mark.parametrize("stem", UNROLLED)
def test_every_expert_matmul_of_an_unroll_is_quantized(stem):
    result = applied(stem, "experts-int4")
    found = experts(result)
    assert len(found) == 16 and {w.expert for w in found} == set(range(4))
    quantized = [node for node in result.model.graph if node.op_type == "MatMulNBits"]
    names = {f"{weight.name}_q4" for weight in found}
    assert len([node for node in quantized if node.inputs[1].name in names]) == 16


@pytest.mark.parametrize("stem", UNROLLED)
def test_no_selection_of_a_weight_is_left(stem):
    graph = applied(stem, "experts-int4").model.graph
    left = [
        node.name
        for node in graph
        if node.op_type in WEIGHT_MOVES and (stack := node.inputs[0]) is not None and _is_float_stack(stack)
    ]
    assert not left
    assert not [name for name, value in graph.initializers.items() if _is_float_stack(value)]


def _is_float_stack(value):
    tensor = value.const_value
    return tensor is not None and tensor.dtype.is_floating_point() and len(tensor.shape) == 3 and tensor.shape[0] == 4


@pytest.mark.parametrize("stem", UNROLLED)
def test_every_application_is_proved(stem):
    report = applied(stem, "experts-int4").report
    assert len(report.proofs) == len(report.applications) == sum(report.applied.values())
    assert all(proof.runtime != "none" and proof.max_relative < 1e-5 for proof in report.proofs)
    assert report.applied["unstack"] == 16


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("stem", UNROLLED)
def test_bits_of_an_expert_weight(stem, symmetric):
    """A row of a down weight is one block, whose zero point takes a byte of its own: 5.25 bits instead of 5.125."""
    found = experts(applied(stem, "experts-int4", ("quantization.default.symmetric", symmetric)))
    assert len(found) == 16
    for weight in found:
        padded = 5.25 if weight.role == "expert.down" else 5.125
        assert 8 * weight.bytes_after / (weight.bytes_before / 4) == (5.0 if symmetric else padded)


@pytest.mark.parametrize("stem", UNROLLED)
def test_the_quantized_model_runs(stem):
    feeds, expected = recorded(find(stem))
    actual = OrtRuntime().run(ir.to_proto(applied(stem, "experts-int4").model), feeds)
    assert {k: v.shape for k, v in actual.items()} == {k: v.shape for k, v in expected.items()}
    assert all(np.isfinite(v).all() for v in actual.values())


@pytest.mark.parametrize("file", [file for file in VALID if recorded(file)], ids=name_of)
def test_unstacking_changes_no_number(file):
    result = rewriter.apply(file, "unstack", overrides=ALL)
    feeds, expected = recorded(file)
    actual = OrtRuntime().run(ir.to_proto(result.model), feeds)
    for name, value in expected.items():
        close(actual[name], value, 1e-6 if value.dtype == np.float32 else 1e-3)


@pytest.mark.parametrize("file", VALID, ids=name_of)
@pytest.mark.parametrize("rules", ["moe-int4", "moe-int8", "experts-int4"])
def test_every_model_ends_rewritten_or_with_reasons(file, rules):
    before = onnx.load(file)
    result = rewriter.apply(file, rules)
    after = ir.to_proto(result.model)
    assert all(decline.reason for decline in result.report.declines)
    assert [o.name for o in after.graph.output] == [o.name for o in before.graph.output]
    assert [i.name for i in after.graph.input] == [i.name for i in before.graph.input]
    assert accepted(after) or not accepted(before)
    if recorded(file):
        feeds, expected = recorded(file)
        actual = OrtRuntime().run(after, feeds)
        assert set(expected) <= set(actual)
    elif not result.report.applications:
        assert histogram(result.model) == histogram(ir.from_proto(before))
    assert rewriter.apply(result.model, rules).report.applied == {}


@pytest.mark.parametrize("file", [file for file in FILES if file.stem in INVALID], ids=name_of)
def test_an_invalid_model_is_refused_by_name(file):
    with pytest.raises(ModelError) as caught:
        rewriter.apply(file)
    message = str(caught.value)
    assert file.name in message and "\n" not in message


@pytest.mark.parametrize("stem", UNROLLED)
def test_the_same_model_gives_the_same_bytes(stem, tmp_path):
    saved = [rewriter.apply(find(stem)).save(tmp_path / str(i)) for i in range(2)]
    assert saved[0].read_bytes() == saved[1].read_bytes()
    with pytest.raises(TargetError):
        OrtRuntime().run(saved[0], {})


@pytest.mark.parametrize("stem", UNROLLED)
def test_a_name_of_a_weight_says_where_it_comes_from(stem):
    graph = rewriter.apply(find(stem), "unstack").model.graph
    slices = [name for name in graph.initializers if "__slice_" in name]
    assert len(slices) == 16 and all(name.endswith("__T") for name in slices)
    stacks = {name.split("__slice_")[0] for name in slices}
    assert stacks <= set(ir.load(find(stem)).graph.initializers)
    assert not stacks & set(graph.initializers)


@pytest.mark.parametrize("stem", ["llama_tied_fp32_cpu", "llama_tied_fp16_cuda", "gpt_oss_fp32_cpu"])
def test_linears_need_no_types_of_values(stem):
    """ONNX's inference stops at SimplifiedLayerNormalization in the default domain; an optimizer may leave no types."""
    proto = onnx.load(find(stem))
    full = rewriter.apply(proto, "moe-int4").report.applied
    del proto.graph.value_info[:]
    model = ir.from_proto(proto)
    result = rewriter.apply(model, "moe-int4", overrides=ALL)
    assert result.report.applied == full and full["matmul-to-matmul-nbits"] >= 5
    check_outputs(model, result.model)


@pytest.mark.parametrize("name", sorted(rule_sets()))
def test_no_shipped_rule_set_quantizes_a_router(name):
    overrides = {"parity.local": "none"}
    result = rewriter.apply(find("qwen3_moe__default"), name, overrides=overrides, prover=lambda *_: None)
    assert "router" not in {weight.role for weight in result.report.weights}
