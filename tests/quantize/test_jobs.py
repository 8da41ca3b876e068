"""Jobs: the plan goes by the names under which weights are stored, and a proof quantizes each weight once."""

from __future__ import annotations

import collections
import threading

import numpy as np
import pytest

import rewriter
from rewriter.quantize import ALGORITHMS
from rewriter.quantize.rows import CHUNK, SHARED, over_rows, shared_out

MODEL = "tests/models/mobius/qwen3_moe_dense_experts_f32.onnx"
"""Two layers of four experts; gate, up and down of each are weights of their own."""
EXPERT = "model.layers.0.mlp.experts.1"
QKV = [f"model.layers.0.self_attn.{part}_proj.weight_t" for part in "qkv"]


def rewritten(tmp_path, **plan):
    result = rewriter.apply(MODEL, {"extends": "moe-int4", "quantization": plan})
    result.save(tmp_path / "out")
    return result.report


def blocks(report, role):
    return dict(collections.Counter(weight.block_size for weight in report.weights if weight.role == role))


@pytest.mark.parametrize(
    ("glob", "fused", "reason", "counts"),
    [
        ("*.experts.*", 2, "", {"expert.down": {16: 8}, "expert.gate_up": {16: 8}}),
        (f"{EXPERT}.down_proj.weight_t", 1, "quantizes a stack whole", {"expert.down": {32: 7, 16: 1}}),
        (f"{EXPERT}.gate_proj.*", 1, "joined here different forms", {"expert.gate": {32: 3, 16: 1}}),
    ],
)
def test_an_override_holds_for_stored_weights_that_would_be_fused(tmp_path, glob, fused, reason, counts):
    report = rewritten(tmp_path, overrides=[{"weights": glob, "block_size": 16}])
    assert report.applied["fuse-experts"] == fused
    assert [said for rule, said in report.declined if rule == "fuse-experts" and reason in said] or not reason
    assert {role: blocks(report, role) for role in counts} == counts


def test_what_is_excluded_by_its_stored_name_stays_float(tmp_path):
    report = rewritten(tmp_path, exclude=[{"weights": f"{EXPERT}.*"}, {"role": "router"}])
    left = {weight.name for weight in report.left}
    assert {f"{EXPERT}.{part}_proj.weight_t" for part in ("gate", "up", "down")} <= left
    assert report.applied["fuse-experts"] == 1


def test_a_packed_projection_goes_by_each_of_its_names(tmp_path):
    report = rewritten(tmp_path, overrides=[{"weights": QKV, "bits": 8}])
    assert {weight.layer: weight.bits for weight in report.weights if weight.role == "attention.qkv"} == {0: 8, 1: 4}


def test_a_report_names_the_algorithm_that_made_the_codes(tmp_path):
    for quantizer, name in ((None, "rtn"), (ALGORITHMS["k-quant"], "custom")):
        result = rewriter.apply(MODEL, "rtn", quantizer=quantizer)
        result.save(tmp_path / "out", overwrite=True)
        assert {weight.algorithm for weight in result.report.weights} == {name}


def test_a_proof_quantizes_each_weight_once():
    asked = collections.Counter()

    def counting(weight, context):
        asked[context.weight, context.role] += 1
        return ALGORITHMS["rtn"](weight, context)

    report = rewriter.apply(MODEL, quantizer=counting).report
    assert (
        report.applied["moe-to-qmoe"] == 2 and sum(key[1].startswith("expert") for key in asked) == 16
    )  # of both layers
    assert set(asked.values()) == {1}


def test_a_weight_quantized_by_one_of_several_threads_waits_for_none_of_them():
    """As where the experts of a stack are computed at once, each large enough to be shared out itself."""
    weight = np.ones((SHARED // CHUNK, CHUNK), np.float32)
    found = []

    def work():
        rows = shared_out(lambda number: number + sum(over_rows(weight, lambda first, _: first)), range(64))
        found.extend(rows)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(60)
    assert found == [sum(range(len(weight))) + number for number in range(64)]
