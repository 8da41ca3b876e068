"""Weights that were trained in few bits: read once, left to the next algorithm where they are off, and said so."""

from __future__ import annotations

import tracemalloc

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from block_models import Spelling, block_model
from born_models import GPT_OSS, E, H, I, born, with_stacks
from moe_models import attributes_of, moe_model, nodes_of, rewrite, rule_set

import rewriter
from rewriter import html
from rewriter.cli import main
from rewriter.errors import QuantizationError, RewriterWarning
from rewriter.io import save
from rewriter.quantize import born as born_weights
from rewriter.quantize import lossless
from rewriter.quantize.born import look
from rewriter.tensors import View, interleaved, stacked

CPU = "cpu@1.32"
UNPROVED = {"parity.local": "none"}
OFF = "block (expert 1, row 5, columns 32 to 63) of 'layer0.fc1' is off the grid of mxfp4"


def stacks(grid="mxfp4", dtype=np.float16):
    return born(grid, 2 * I, H, dtype, 0)[0], born(grid, H, I, dtype, 1)[0]


def nudged():
    """One number of one expert by one unit, at a place that no sample holds."""
    fc1, fc2 = stacks()
    fc1.view(np.uint16)[1, 5, 40] ^= 1
    return with_stacks(fc1, fc2)


@pytest.fixture
def elements_read(monkeypatch):
    """How many numbers of weights were read so far."""
    read, plain = [0], View.numpy

    def numpy(view):
        read[0] += view.size
        return plain(view)

    monkeypatch.setattr(View, "numpy", numpy)
    return read


def test_weights_on_a_grid_are_read_as_they_are_written(tmp_path, monkeypatch, elements_read):
    wide, plain, whole = 4 * H, lossless.read, []
    monkeypatch.setattr(lossless, "read", lambda weight, *given: whole.append(weight.shape) or plain(weight, *given))
    model = moe_model(GPT_OSS, dtype=np.float16, hidden=wide, inter=wide, experts=E)
    stack = dict(zip(("layer0.fc1", "layer0.fc2"), (2 * wide, wide), strict=True))
    for tensor in model.graph.initializer:
        if tensor.name in stack:
            array = born("mxfp4", stack[tensor.name], wide, np.float16, 0)[0]
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    result = rewrite(model, "moe-int4", CPU, overrides=UNPROVED)
    assert elements_read[0] < 0.02 * 3 * E * wide * wide
    whole.clear()
    result.save(tmp_path / "out")
    assert sorted(whole) == sorted([(rows, wide) for rows in stack.values()] * E)
    assert {weight.grid for weight in result.report.weights} == {"kept as it was trained"}


def test_an_ordinary_weight_costs_a_few_blocks(elements_read):
    model = moe_model(GPT_OSS, dtype=np.float16, hidden=8 * H, inter=8 * H, experts=E)
    rewrite(model, "moe-int4", CPU, overrides=UNPROVED)
    assert elements_read[0] < 0.01 * 3 * E * (8 * H) ** 2


def test_a_weight_that_two_rules_ask_about_is_looked_at_once(monkeypatch):
    looks = []
    monkeypatch.setattr(born_weights, "look", lambda view: looks.append(view) or look(view))
    model = block_model(Spelling(weights="gather", hidden=32, inter=32))
    report = rewriter.explain(model, rules="moe-int4", target=CPU)
    assert report.applied["fuse-experts"] == report.applied["moe-to-qmoe"] == 1
    assert len(looks) == len(set(looks)) == 1


def test_a_look_at_many_experts_of_their_own_holds_a_few_rows():
    experts = [born("mxfp4", 128, 256, np.float16, seed)[0] for seed in range(32)]
    own = [View.whole(ir.tensor(a), f"w{i}") for i, a in enumerate(np.concatenate(experts))]
    shown = interleaved(stacked(own[0::2]), stacked(own[1::2]))
    look(shown)
    tracemalloc.start()
    assert look(shown).specs[0].format == "mxfp4"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < shown.nbytes / 4


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_of_an_ordinary_weight_a_part_of_a_row_is_read(dtype, elements_read):
    numbers = np.random.default_rng(0).standard_normal((8, 64, 256), np.float32).astype(dtype)
    own = [View.whole(ir.tensor(a), f"w{i}") for i, a in enumerate(numbers)]
    look(interleaved(stacked(own[0::2]), stacked(own[1::2])))
    assert elements_read[0] < numbers.shape[-1]


@pytest.mark.parametrize("overrides", [UNPROVED, {"parity.local": "all"}])
def test_what_no_sample_showed_is_found_when_it_is_written(overrides, tmp_path):
    result = rewrite(nudged(), "moe-int4", CPU, overrides=overrides)
    result.save(tmp_path / "out")
    weights = result.report.weights
    assert {(w.algorithm, w.bits, w.format) for w in weights} == {("mse-search", 4, "int")}
    assert {w.grid for w in weights} == {OFF}
    (node,) = nodes_of(onnx.load(tmp_path / "out" / "model.onnx"), "QMoE")
    assert "quant_type" not in attributes_of(node)
    assert result.report.on_grids == (
        f"{OFF}; mse-search took {2 * E} weights that are held together in 4 bits, blocks of 32",
    )


def test_a_model_in_memory_is_looked_at_again_too():
    model = rewrite(nudged(), "moe-int4", CPU, overrides=UNPROVED).model
    (node,) = nodes_of(model, "QMoE")
    assert "quant_type" not in attributes_of(node)


def test_a_run_that_looked_again_and_was_interrupted_is_gone_on_with(tmp_path):
    onnx.save(nudged(), tmp_path / "model.onnx")
    options = {"max_shard_size": 1 << 20, "resume": True}

    def result():
        return rewriter.apply(tmp_path / "model.onnx", target=CPU, overrides=UNPROVED)

    first = result()
    sampled = first.ir_model

    def interrupt(done, total):
        if first.ir_model is not sampled and done > total / 2:  # so that something that is computed is there
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), pytest.warns(RewriterWarning, match="is kept"):
        first.save(tmp_path / "out", progress=interrupt, **options)
    again = result()
    with pytest.warns(RewriterWarning, match="went on where"):
        again.save(tmp_path / "out", **options)
    result().save(tmp_path / "whole", max_shard_size=1 << 20)
    files = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("out", "whole")]
    assert files[0] == files[1] and OFF in str(again.report.on_grids)


def test_who_saves_it_another_way_is_told_where_and_what_to_do(tmp_path):
    result = rewrite(nudged(), "moe-int4", CPU, overrides=UNPROVED)
    with pytest.raises(QuantizationError, match=r"block \(row 5, columns 32 to 63\) of 'layer0.fc1__slice_1' is off"):
        save(result.ir_model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_block_of_the_sample_that_is_off_costs_no_second_look(monkeypatch):
    monkeypatch.setattr(lossless, "quantize", None)
    fc1, fc2 = stacks()
    fc1[0, 0, 40] = 0.0123
    result = rewrite(with_stacks(fc1, fc2), "moe-int4", CPU, overrides=UNPROVED)
    assert result.model
    where = "block (expert 0, row 0, columns 32 to 63) of 'layer0.fc1' is off the grid of mxfp4"
    assert {weight.grid for weight in result.report.weights} == {where}


def test_lossless_alone_says_which_block_keeps_a_weight_in_float():
    fc1, fc2 = stacks()
    fc1[0, 0, 40] = 0.0123
    result = rewrite(with_stacks(fc1, fc2), rule_set(["moe-to-qmoe"], algorithm="lossless"), CPU)
    (decline,) = result.report.declines
    assert decline.reason.endswith("columns 32 to 63) of 'layer0.fc1' is off the grid of mxfp4")


def test_the_report_says_what_is_kept_and_which_block_is_off(tmp_path, capsys):
    for name, model in {"kept": with_stacks(*stacks()), "off": nudged()}.items():
        onnx.save(model, tmp_path / f"{name}.onnx")
        arguments = [str(tmp_path / f"{name}.onnx"), "-o", str(tmp_path / name), "-r", "moe-int4", "--target", CPU]
        files = ["--report", str(tmp_path / f"{name}.json"), "--html", str(tmp_path / f"{name}.html")]
        assert main(["apply", *arguments, *files]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"Kept as trained, mxfp4: {E} expert.down and {E} expert.gate_up." in shown
    assert f"B{OFF[1:]}; mse-search took {2 * E} weights that are held together" in shown
    assert '"grid": "kept as it was trained"' in (tmp_path / "kept.json").read_text()
    assert OFF in (tmp_path / "off.json").read_text()
    assert "ept as trained, mxfp4" in (tmp_path / "kept.html").read_text()
    assert "is off the grid of mxfp4" in (tmp_path / "off.html").read_text()


def test_a_dry_run_reads_a_sample_and_says_what_would_be_kept(elements_read):
    report = rewriter.explain(with_stacks(*stacks()), rules="moe-int4", target=CPU)
    assert {weight.grid for weight in report.weights} == {"kept as it was trained"}
    assert "ept as trained" in html.page(report)
