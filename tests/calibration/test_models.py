"""Calibrations of models that exporters wrote, against what the given model itself computes on the way."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import rewriter
from rewriter import Calibration, calibrate, io
from rewriter.calibration import capture, experts
from rewriter.engine.context import ModelRun
from rewriter.errors import TargetError, UsageError
from rewriter.parity.model_inputs import token_feeds
from rewriter.parity.runtime import OrtRuntime
from rewriter.quantize import rtn

MODELS = Path(__file__).parents[1] / "models"
GROUPED = MODELS / "hf_exporter" / "qwen3_moe__default.onnx"
TOKENS = np.random.default_rng(1).integers(0, 100, (3, 12))

FORMS = (
    "genai/gpt_oss_fp32_cpu",
    "genai/lfm2_moe_fp32_cpu",
    "hf_exporter/gpt_oss__default",
    "hf_exporter/mixtral__batched_mm",
    "hf_exporter/qwen3_moe__default",
    "hf_exporter/qwen3_moe__ortcuda",
    "mobius/gemma4_silu_static_unroll_pr324_f32",
    "mobius/gemma4_static_unroll_pr324_f16",
    "mobius/granitemoehybrid_static_unroll_f32",
    "mobius/qwen3_moe_dense_experts_f32",
    "mobius/llama_tied_dense_f32",
)


@pytest.mark.parametrize("name", FORMS)
def test_every_weight_that_is_quantized_is_known(name, tmp_path, monkeypatch):
    file = MODELS / f"{name}.onnx"
    calibration = calibrate(file, tmp_path / "c", tokens=TOKENS)
    asked = []
    quantize = ModelRun.quantize

    def watched(self, weight, reader, *args, **options):
        job = quantize(self, weight, reader, *args, **options)
        if job.context.role != "embedding":
            asked.append((job.context.weight, job.context.role, calibration.of(weight, options.get("expert"))))
        return job

    monkeypatch.setattr(ModelRun, "quantize", watched)
    rewriter.apply(file, "moe-int4")
    assert asked
    assert not [(weight, role) for weight, role, seen in asked if seen is None]
    for weight, role, seen in asked:
        if not role.startswith("expert"):
            assert seen.count in (TOKENS.size, len(TOKENS)), weight


def tapped(file, values, feeds):
    """What the given model computes at some values."""
    proto = onnx.load(file)
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in values)
    return OrtRuntime().run(proto, feeds)


def test_the_rows_are_those_that_the_given_model_computes(tmp_path):
    """transformers' export sorts tokens by expert: each has a MatMul of its own, whose operands are the oracle."""
    calibration = calibrate(GROUPED, tmp_path / "c", tokens=TOKENS)
    model = io.load(GROUPED)
    wanted = {}
    for node in model.graph:
        if node.op_type == "MatMul":
            source, expert = weight_of(node)
            if source is not None:
                wanted[source, expert] = node.inputs[0].name
    assert {expert for _, expert in wanted} == {None, *range(4)}
    runs = [tapped(GROUPED, wanted.values(), token_feeds(model, row[None])) for row in TOKENS]
    for (source, expert), value in wanted.items():
        expected = np.concatenate([run[value].reshape(-1, run[value].shape[-1]) for run in runs])
        seen = calibration.activations(source, expert)()
        assert seen.shape == expected.shape, (source, expert)
        nearest = [int(np.abs(seen - row).max(axis=1).argmin()) for row in expected]  # a sort has an order of its own
        assert sorted(nearest) == list(range(len(expected))) or not seen_apart(expected)
        np.testing.assert_allclose(seen[nearest], expected, rtol=0, atol=1e-2 * np.abs(expected).max(initial=1e-9))


def seen_apart(rows):
    """Whether no two rows are one: a token may stand twice where nothing before it differs."""
    return len(np.unique(np.round(rows, 3), axis=0)) == len(rows)


def weight_of(node):
    """The initializer behind a MatMul's second operand, and the expert that a Split takes from it."""
    value, expert = node.inputs[1], None
    while value.producer() is not None and value.producer().op_type in ("Squeeze", "Split", "Transpose"):
        if value.producer().op_type == "Split":
            expert = list(value.producer().outputs).index(value)
        value = value.producer().inputs[0]
    return (value.name, expert) if value.is_initializer() else (None, None)


@pytest.mark.parametrize("name", ["hf_exporter/qwen3_moe__default", "mobius/granitemoehybrid_static_unroll_f32"])
def test_a_model_larger_than_the_memory_is_run_part_after_part_and_expert_by_expert(name, tmp_path, monkeypatch):
    computed = []

    def spy(site, feeds):
        computed.append((site.layer, len(feeds)))
        return experts.outputs(site, feeds)

    monkeypatch.setattr(capture, "outputs", spy)
    file = MODELS / f"{name}.onnx"
    whole, parts = (calibrate(file, tmp_path / str(m), tokens=TOKENS, memory=m) for m in (None, 1))
    layers = {choice.layer for choice in parts.choices}
    assert {(layer, len(TOKENS)) for layer in layers if layer != max(layers)} <= set(computed)
    assert parts.choices == whole.choices
    for part in whole.weights:
        seen, expected = (c.activations(*part)() for c in (parts, whole))
        np.testing.assert_allclose(seen, expected, rtol=0, atol=2e-3 * np.abs(expected).max(initial=1e-9))


def test_the_folder_is_an_imatrix(tmp_path):
    calibrate(GROUPED, tmp_path / "c", tokens=TOKENS)
    seen = {}

    def quantizer(weight, context):
        seen[context.sources[0], context.expert, context.weight] = context.importance
        return rtn.quantize(weight, context)

    rewriter.apply(GROUPED, "rtn", imatrix=tmp_path / "c", quantizer=quantizer).save(tmp_path / "out")
    calibration = Calibration.open(tmp_path / "c")
    known = {name: array for name, array in seen.items() if array is not None}
    assert len(known) > len(seen) / 2
    for (source, expert, name), array in known.items():
        rows = calibration.activations(source, expert if "__slice_" in name else None)()
        if len(rows):
            np.testing.assert_allclose(array, np.square(rows).mean(axis=0), rtol=2e-2, atol=1e-9)


def test_tables_count_their_tokens(tmp_path):
    calibration = calibrate(GROUPED, tmp_path / "c", tokens=TOKENS)
    (name,) = (name for name in io.load(GROUPED).graph.initializers if "embed_tokens" in name)
    counts = calibration.frequencies(name)
    np.testing.assert_array_equal(counts[:100], np.bincount(TOKENS.reshape(-1), minlength=100))
    assert calibration.tokens == counts.sum() == TOKENS.size
    assert calibration.frequencies("nothing") is None


def test_padding_is_left_out(tmp_path):
    model = io.load(GROUPED)
    feeds = []
    for row in TOKENS:
        feed = token_feeds(model, row[None])
        feed["attention_mask"][:, :5] = 0
        feeds.append(feed)
    calibration = calibrate(GROUPED, tmp_path / "c", feeds=feeds)
    assert calibration.tokens == TOKENS[:, 5:].size
    assert all(sum(choice.counts) == choice.k * TOKENS[:, 5:].size for choice in calibration.choices)


def test_a_calibration_of_a_model_in_memory_is_that_of_its_file(tmp_path):
    kinds = {"path": GROUPED, "ir": ir.load(GROUPED), "proto": onnx.load(GROUPED)}
    for kind, model in kinds.items():
        calibrate(model, tmp_path / kind, tokens=TOKENS)
    for file in sorted(found.name for found in (tmp_path / "path").iterdir()):
        if not file.endswith(".npz"):
            first, *others = ((tmp_path / kind / file).read_bytes() for kind in kinds)
            assert all(other == first for other in others), file


def test_a_model_that_is_quantized_has_nothing_to_calibrate(tmp_path):
    with pytest.raises(UsageError, match="no float weight"):
        calibrate(quantized(), tmp_path / "c", feeds=[{"x": np.zeros((1, 4), np.float32)}])


def quantized():
    text = "agraph (float[T, 4] x) => (float[T, 4] y) { y = Relu(x) }"
    return onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}')


def test_a_model_that_does_not_run_is_one_line(tmp_path):
    model = onnx.load(GROUPED)
    node = next(node for node in model.graph.node if node.op_type == "Softmax")
    node.op_type, node.domain = "Nonesuch", "nowhere"
    model.opset_import.append(onnx.helper.make_opsetid("nowhere", 1))
    with pytest.raises(TargetError, match=r"ONNX Runtime \(cpu\) cannot load the model"):
        calibrate(model, tmp_path / "c", tokens=TOKENS)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((2, 4)), "tokens are integers"),
        (np.zeros((2, 4, 1), int), "tokens are integers"),
        (np.full((1, 4), 1 << 20), "token 1048576 is none of the model's"),
        (np.array([[1, -3]]), "token -3 is none of"),
        (None, "takes either tokens or feeds"),
    ],
)
def test_wrong_tokens_are_refused(tokens, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        calibrate(GROUPED, tmp_path / "c", tokens=tokens)


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is no calibration"):
        Calibration.open(tmp_path)
    calibrate(GROUPED, tmp_path / "c", tokens=TOKENS)
    with pytest.raises(UsageError, match="exists and holds files; choose another"):
        calibrate(GROUPED, tmp_path / "c", tokens=TOKENS)
    calibrate(GROUPED, tmp_path / "c", tokens=TOKENS[:1], overwrite=True)
    cut = tmp_path / "c" / "x0.f16"
    cut.write_bytes(cut.read_bytes()[:-2])
    with pytest.raises(UsageError, match="missing or cut; calibrate again"):
        Calibration.open(tmp_path / "c")
    manifest = tmp_path / "c" / "calibration.json"
    manifest.write_text(json.dumps({"version": 99}))
    with pytest.raises(UsageError, match="another version or broken"):
        Calibration.open(tmp_path / "c")
