"""What a report says of the outputs of quantized weights, where a calibration tells what they see."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

import rewriter
from rewriter import calibrate
from rewriter.cli import main
from rewriter.html import fragment
from rewriter.html.heat import OUTPUTS, WEIGHTS, grid, heat_maps
from rewriter.quantize import rtn

GROUPED = Path(__file__).parents[1] / "models" / "hf_exporter" / "qwen3_moe__default.onnx"
TOKENS = np.random.default_rng(1).integers(0, 100, (3, 12))


def test_every_weight_has_the_error_of_its_output(tmp_path):
    calibrate(GROUPED, tmp_path / "c", tokens=TOKENS)
    expected = {}

    def quantizer(weight, context):
        quantized = rtn.quantize(weight, context)
        if context.activations is not None:
            x = context.activations()
            exact, approximate = (x @ w.astype(np.float32).T for w in (weight, quantized.dequantize()))
            size = np.linalg.norm(exact)
            expected[context.weight, context.layer, context.role] = (
                np.linalg.norm(approximate - exact) / size if size else None
            )
        return quantized

    result = rewriter.apply(GROUPED, "rtn", quantizer=quantizer, calibration=tmp_path / "c")
    result.save(tmp_path / "out")
    known = [weight for weight in result.report.weights if weight.output_rms is not None]
    assert len(known) == 4 * 2 * 2 + 2 * 2 + 1, "experts, attention, lm_head"
    for weight in known:
        assert math.isclose(weight.output_rms, expected[weight.name, weight.layer, weight.role], rel_tol=1e-3)
    layers = result.report.by_layer
    assert sum(layer.count for layer in layers) == len(known)
    assert [layer.mean for layer in layers] == sorted((layer.mean for layer in layers), reverse=True)
    assert all(layer.largest == layer.worst.output_rms for layer in layers)
    assert {weight.role for weight in result.report.weights if weight.output_rms is None} <= {"embedding"}
    plain = rewriter.apply(GROUPED, "rtn")
    plain.save(tmp_path / "plain")
    assert plain.report.by_layer == ()


def test_apply_prints_the_worst_layers(tmp_path, capsys):
    calibrate(GROUPED, tmp_path / "c", tokens=TOKENS)
    assert (
        main(["apply", str(GROUPED), "-o", str(tmp_path / "o"), "-r", "rtn", "--calibration", str(tmp_path / "c")]) == 0
    )
    printed = " ".join(capsys.readouterr().out.split())
    assert "Output errors, worst first" in printed
    assert "x what the weight saw when it was calibrated" in printed


def test_pages_and_json_show_the_errors_of_outputs_where_they_are_known(tmp_path):
    calibrate(GROUPED, tmp_path / "c", tokens=TOKENS)
    for folder, known in ((tmp_path / "c", True), (None, False)):
        result = rewriter.apply(GROUPED, "rtn", calibration=folder)
        result.save(tmp_path / f"o{known}")
        maps = heat_maps(result.report.weights)
        assert {found.what for found in (*maps, grid(result.report.weights))} == {OUTPUTS if known else WEIGHTS}
        assert ("output error, layer by expert" in fragment(result.report)) == known
        errors = result.report.to_json()["output_errors"]
        assert [e["mean"] for e in errors] == sorted((e["mean"] for e in errors), reverse=True)
        assert bool(errors) == known
        if known:
            rms = {w.name: w.output_rms for w in result.report.weights}
            assert all(e["largest"] == rms[e["worst"]] for e in errors)
            largest = max(w.output_rms for w in result.report.weights if w.expert is not None and w.output_rms)
            titles = [cell.title for found in maps for row in found.rows for cell in row.cells]
            assert any(title.endswith(f"{largest:.2%}") for title in titles)
            none = [w for w in result.report.weights if w.expert is not None and w.output_rms is None]
            assert len(titles) == sum(found.count for found in maps) - len(none)
