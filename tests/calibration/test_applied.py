"""What a calibration does to a rewrite: every quantizer gets what its very weight saw, and gptq goes by it."""

from __future__ import annotations

import numpy as np
import pytest
from block_models import Spelling, block_arrays, block_model
from test_experts import evaluated

import rewriter
from rewriter.calibration.capture import calibrate
from rewriter.cli import main
from rewriter.errors import UsageError
from rewriter.quantize import ALGORITHMS

SPELLINGS = [
    Spelling(hidden=32, inter=16, halves="apart"),
    Spelling(hidden=32, inter=16, weights="split", halves="interleaved", rank=3),
    Spelling(hidden=32, inter=16, weights="own", halves="apart", combine="slots"),
    Spelling(hidden=16, inter=32, weights="own-transposed", combine="where", rank=3),
    Spelling(hidden=32, inter=16, combine="dense", router="topk-softmax"),
]
EXPERTS = {"quantization.default.block_size": 16, "parity.local": "none"}


def tokens(how, count=200):
    """x whose features go together, as those of a trained network."""
    rng = np.random.default_rng(3)
    directions = rng.standard_normal((how.hidden // 4, how.hidden)) / 2
    x = rng.standard_normal((count, how.hidden // 4)) @ directions
    x = (x + 0.3 * rng.standard_normal(x.shape)).astype(how.dtype)
    return [{"x": x if how.rank == 2 else x[None]}]


def seen_by_quantizers(how, calibration, rules):
    """Applies a rule set, and returns of each quantized weight of an expert its matrix and what it saw."""
    found = []

    def spy(weight, context):
        if context.role.startswith("expert") and context.activations is not None:
            found.append((context, np.asarray(weight, np.float64), context.activations()))
        return ALGORITHMS["rtn"](weight, context)

    result = rewriter.apply(block_model(how), rules, quantizer=spy, calibration=calibration, overrides=EXPERTS)
    for value in result.ir_model.graph.initializers.values():
        value.const_value.numpy()
    return found


def hold(how, calibration, rules):
    """Holds what each quantizer was given to NumPy's evaluation of the block; returns how many weights there were."""
    arrays = {name: array.astype(np.float64) for name, array in block_arrays(how).items()}
    expected = evaluated(how, tokens(how))
    given = seen_by_quantizers(how, calibration, rules)
    owners = {tuple(row): e for name in ("gate", "up", "down") for e in range(how.experts) for row in arrays[name][e]}
    for context, weight, rows in given:
        (expert,) = {owners[tuple(row)] for row in weight}
        right = expected[expert][context.role == "expert.down"]
        assert rows.shape == right.shape, context.weight
        np.testing.assert_allclose(rows, right, rtol=0, atol=3e-3 * np.abs(right).max())
    return len(given)


@pytest.mark.parametrize("how", SPELLINGS, ids=str)
@pytest.mark.parametrize("rules", ["experts-int4", "moe-int4"])
def test_each_quantizer_gets_what_its_weight_saw(rules, how, tmp_path):
    calibrate(block_model(how), tmp_path / "c", feeds=tokens(how))
    assert hold(how, tmp_path / "c", rules) >= 2 * how.experts


class Neighbour:
    """Gives each expert what the next one saw."""

    def __init__(self, right, experts):
        self.right, self.experts = right, experts

    def of(self, weight, expert=None):
        if weight.expert is None and expert is None:
            return self.right.of(weight, expert)
        index = weight.expert if expert is None else expert
        step = weight.source.size // self.experts
        moved = weight.__class__(
            weight.source,
            weight.name,
            weight.offset + ((index + 1) % self.experts - index) * step,
            weight.shape,
            weight.strides,
            weight.dtype,
        )
        return self.right.of(moved, (index + 1) % self.experts)


class Turned:
    """Gives the features of each weight in another order."""

    def __init__(self, right):
        self.right = right

    def of(self, weight, expert=None):
        rows = self.right.of(weight, expert)
        return None if rows is None else lambda: rows()[:, ::-1]


@pytest.mark.parametrize("mistake", ["neighbour", "turned"])
def test_a_wrong_wiring_is_caught(mistake, tmp_path):
    how = SPELLINGS[0]
    right = calibrate(block_model(how), tmp_path / "c", feeds=tokens(how))
    assert hold(how, right, "experts-int4")
    wrong = Neighbour(right, how.experts) if mistake == "neighbour" else Turned(right)
    with pytest.raises(AssertionError):
        hold(how, wrong, "experts-int4")


def block_error(how, **more):
    """The mean squared error of the block's output on what it was calibrated on."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model = block_model(how)
    changed = {**EXPERTS, "quantization.default.symmetric": False, "quantization.default.bits": 4}
    after = rewriter.apply(model, "experts-int4", overrides=changed | more.pop("overrides", {}), **more).model
    (feed,) = tokens(how)
    outputs = [
        onnxruntime.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feed)[0]
        for m in (model, after)
    ]
    return float(np.square(outputs[1] - outputs[0]).mean())


def test_gptq_lowers_the_error_of_the_blocks_output(tmp_path):
    how = SPELLINGS[0]
    calibrate(block_model(how), tmp_path / "c", feeds=tokens(how, 2000))
    plain = block_error(how)
    gptq = {"quantization.default.algorithm": "gptq"}
    assert block_error(how, overrides=gptq, calibration=tmp_path / "c") < 0.8 * plain
    assert block_error(how, overrides=gptq) == plain


@pytest.mark.parametrize("rules", ["moe-mxfp4", "moe-nvfp4", "moe-int3"])
def test_gptq_rounds_to_every_form_that_a_target_runs(rules, tmp_path):
    how = Spelling(hidden=64, inter=64, halves="apart", dtype="float16")
    calibration = calibrate(block_model(how), tmp_path / "c", feeds=tokens(how, 500))
    errors = []
    for algorithm in ("gptq", "mse-search"):
        chosen = {"quantization.default.algorithm": algorithm}
        result = rewriter.apply(
            block_model(how),
            rules,
            overrides=chosen,
            calibration=calibration,
            target="cpu@1.32",
            prover=lambda *_: None,
        )
        result.save(tmp_path / algorithm)
        weights = [w for w in result.report.weights if w.role.startswith("expert")]
        assert {(w.algorithm, w.format if w.format != "int" else w.bits) for w in weights} == {
            (algorithm, 3 if rules == "moe-int3" else rules.removeprefix("moe-"))
        }
        errors.append(sum(w.output_rms**2 for w in weights))
    assert errors[0] < 0.8 * errors[1]


def uneven(how):
    """Tokens of which expert 0 sees three and expert 2 none."""
    router = block_arrays(how)["router"].astype(np.float64)
    x = tokens(how, 900)[0]["x"]
    chosen = np.argsort(-(x.astype(np.float64) @ router), axis=1, kind="stable")[:, : how.k]
    kept = ~(chosen == 2).any(axis=1)
    first = (chosen == 0).any(axis=1) & kept
    kept &= ~first | (np.cumsum(first) <= 3)
    return [{"x": x[kept]}]


@pytest.mark.parametrize("rules", ["experts-int4", "moe-int4"])
def test_experts_of_few_tokens_and_of_none_are_no_worse_than_searched(rules, tmp_path):
    how = SPELLINGS[0]
    calibration = calibrate(block_model(how), tmp_path / "c", feeds=uneven(how))
    assert (calibration.choices[0].counts[0], calibration.choices[0].counts[2]) == (3, 0)
    seen = []

    def both(weight, context):
        ours, search = (ALGORITHMS[name](weight, context) for name in ("gptq", "mse-search"))
        if context.role.startswith("expert"):
            rows = context.activations()
            exact = rows @ weight.T
            seen.append((len(rows), *(np.square(rows @ q.dequantize().T - exact).sum() for q in (ours, search))))
            assert len(rows) or ours.algorithm == "mse-search"
        return ours

    result = rewriter.apply(block_model(how), rules, quantizer=both, calibration=calibration, overrides=EXPERTS)
    for value in result.ir_model.graph.initializers.values():
        value.const_value.numpy()
    assert {0, 3} < {count for count, _, _ in seen}
    assert all(ours <= 1.01 * search for _, ours, search in seen)
    gptq = {**EXPERTS, "quantization.default.algorithm": "gptq"}
    plain = rewriter.apply(block_model(how), rules, overrides=gptq, calibration=calibration)
    plain.save(tmp_path / "o")
    without = {(w.expert, w.algorithm) for w in plain.report.weights if w.planned_algorithm == "gptq"}
    assert without == {(2, "mse-search")}


def test_the_report_says_what_was_not_calibrated(tmp_path):
    how = SPELLINGS[0]
    gptq = {**EXPERTS, "quantization.default.algorithm": "gptq"}
    result = rewriter.apply(block_model(how), "experts-int4", overrides=gptq)
    for value in result.ir_model.graph.initializers.values():
        value.const_value.numpy()
    assert {(w.algorithm, w.planned_algorithm) for w in result.report.weights} == {("mse-search", "gptq")}
    calibration = calibrate(block_model(how), tmp_path / "c", feeds=tokens(how))
    result = rewriter.apply(block_model(how), "experts-int4", overrides=gptq, calibration=calibration)
    for value in result.ir_model.graph.initializers.values():
        value.const_value.numpy()
    assert {(w.algorithm, w.planned_algorithm) for w in result.report.weights} == {("gptq", None)}


def test_a_folder_that_is_none_is_one_clear_line(tmp_path, capsys):
    import onnx

    with pytest.raises(UsageError, match="is no calibration"):
        rewriter.apply(block_model(SPELLINGS[0]), "experts-int4", calibration=tmp_path)
    onnx.save(block_model(SPELLINGS[0]), tmp_path / "m.onnx")
    assert main(["apply", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "o"), "--calibration", str(tmp_path)]) == 2
    assert "is no calibration" in capsys.readouterr().err


def test_the_command_says_how_many_had_no_inputs(tmp_path, capsys):
    import onnx

    how = SPELLINGS[0]
    onnx.save(block_model(how), tmp_path / "m.onnx")
    command = ["apply", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "o"), "-r", "experts-int4"]
    command += ["--set", "quantization.default.algorithm=gptq", "--set", "quantization.default.block_size=16"]
    assert main(command) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"{3 * how.experts} weights planned for gptq, quantized by mse-search instead" in said
