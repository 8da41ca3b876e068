"""What the experts of a block saw, against NumPy's evaluation of the same block."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from block_models import Spelling, block_arrays, block_model
from block_parts import UNGATED
from onnx import numpy_helper

from rewriter import io
from rewriter.calibration import Calibration, finding, recording
from rewriter.calibration.capture import calibrate
from rewriter.errors import TargetError
from rewriter.operators.form import form_of
from rewriter.tensors import constant, interleaved, joined, stacked

SPELLINGS = [
    Spelling(),
    Spelling(weights="split", halves="interleaved", rank=3),
    Spelling(weights="own", halves="apart", combine="slots"),
    Spelling(weights="own-transposed", combine="where", rank=3),
    Spelling(weights="slice", combine="joined-matmul", activation="clamped", bias=True),
    Spelling(combine="chosen", halves="apart"),
    Spelling(combine="dense", router="topk-softmax"),
    Spelling(activation="silu", router="sigmoid-normalised"),
    Spelling(activation="relu", router="table", weights="gather-rank1"),
    Spelling(router="biased"),
    Spelling(dtype="float16", halves="slices"),
    Spelling(activation="geglu", halves="slices"),
    Spelling(activation="squared", combine="where", rank=3),
    Spelling(activation="geglu", router="table", dtype="float16", weights="own"),
    Spelling(router="biased-raw", dtype="float16", combine="chosen"),
    Spelling(router="biased", dtype="float16", combine="chosen-left", halves="interleaved"),
]
"""The last five do not fuse on the CPU: three would elsewhere, and two take their matrices by an index."""


MISTAKES = ("neighbour", "other-tokens", "up-to-down", "down-of-neighbour", "other-activation")


def tokens(how, count=23, seed=5):
    """x [T, H], or [B, S, H], in two runs."""
    x = np.random.default_rng(seed).standard_normal((2, count, how.hidden)).astype(how.dtype)
    return [{"x": part if how.rank == 2 else part[None]} for part in x]


def evaluated(how, feeds):
    """By expert: what gate and up saw, and what down saw."""
    w = {name: array.astype(np.float64) for name, array in block_arrays(how).items()}
    x = np.concatenate([feed["x"].reshape(-1, how.hidden) for feed in feeds]).astype(np.float64)
    scores = x @ w["router"]
    if how.router.startswith("biased"):
        scores = 1 / (1 + np.exp(-scores)) + np.linspace(-0.3, 0.3, how.experts)
    chosen = np.argsort(-scores, axis=1, kind="stable")[:, : how.k]
    seen = []
    for expert in range(how.experts):
        rows = x[(chosen == expert).any(axis=1)]
        gate, up = (rows @ w[name][expert].T + how.bias * w[f"{name}_bias"][expert] for name in ("gate", "up"))
        seen.append((rows, activated(how.activation, gate, up)))
    return seen


def activated(kind, gate, up):
    if kind == "clamped":
        gate, up = np.minimum(gate, 0.7), np.clip(up, -0.7, 0.7)
        return gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
    if kind == "relu":
        return np.maximum(gate, 0)
    if kind == "squared":
        return np.maximum(gate, 0) ** 2
    if kind == "geglu":
        return 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up
    silu = gate * (1 + np.tanh(gate / 2)) / 2
    return silu if kind == "silu" else silu * up


def stored(how, name, expert):
    """Where the model keeps a matrix of one expert."""
    if name != "down" and how.halves != "apart" and how.activation not in UNGATED:
        name = "both"
    return (f"{name}_{expert}", None) if how.weights.startswith("own") else (f"stack_{name}", expert)


def hold(how, folder):
    """Calibrates a block, and holds what each expert saw to what NumPy says."""
    feeds = tokens(how)
    calibrate(block_model(how), folder, feeds=feeds)
    calibration = Calibration.open(folder)
    bound = 8e-3 if how.dtype == "float16" else 3e-3
    for expert, (x, hidden) in enumerate(evaluated(how, feeds)):
        for name, expected in (("gate", x), ("up", x), ("down", hidden)):
            if name == "up" and how.activation in UNGATED:
                continue
            seen = calibration.activations(*stored(how, name, expert))
            assert seen.count == len(expected)
            np.testing.assert_allclose(seen(), expected, rtol=0, atol=bound * np.abs(expected).max())
    return calibration


@pytest.mark.parametrize("how", SPELLINGS, ids=str)
def test_each_expert_has_the_rows_that_it_saw(how, tmp_path):
    calibration = hold(how, tmp_path / "c")
    assert {sum(choice.counts) for choice in calibration.choices} == {46 * how.k}


@pytest.mark.parametrize("how", [SPELLINGS[0], SPELLINGS[2]], ids=str)
@pytest.mark.parametrize(
    "mistake", ["neighbour", "other-tokens", "up-to-down", "down-of-neighbour", "other-activation"]
)
def test_a_wrong_wiring_is_caught(mistake, how, tmp_path, monkeypatch):
    how = replace(how, hidden=8, inter=8)
    hold(how, tmp_path / "right")
    choose, down = recording.choose, recording.down_inputs
    if mistake == "neighbour":
        monkeypatch.setattr(recording, "choose", lambda site, logits: (choose(site, logits) + 1) % how.experts)
    elif mistake == "other-tokens":
        monkeypatch.setattr(recording, "choose", lambda site, logits: np.roll(choose(site, logits), 1, axis=0))
    elif mistake == "up-to-down":
        monkeypatch.setattr(recording, "down_inputs", lambda site, expert, x: x)
    elif mistake == "down-of-neighbour":
        monkeypatch.setattr(recording, "down_inputs", lambda site, e, x: down(site, (e + 1) % how.experts, x))
    else:
        monkeypatch.setattr(finding, "form_of", lambda node: replace(form_of(node), alpha=3.0))
    with pytest.raises(AssertionError):
        hold(how, tmp_path / "wrong")


def test_an_expert_that_saw_nothing_has_no_rows_and_the_importance_of_all(tmp_path):
    how = Spelling(halves="apart")
    model = block_model(how)
    for tensor in model.graph.initializer:
        if tensor.name == "router":
            router = numpy_helper.to_array(tensor).copy()
            router[:, 2] = 0
            tensor.CopyFrom(numpy_helper.from_array(router, "router"))
    x = tokens(how, count=90)[0]["x"]
    feeds = [{"x": x[np.argmin(x @ router, axis=1) == 2]}]
    calibration = calibrate(model, tmp_path / "c", feeds=feeds)
    assert calibration.choices[0].counts[2] == 0
    for name, width in (("gate", how.hidden), ("down", how.inter)):
        assert calibration.activations(f"stack_{name}", 2)().shape == (0, width)
        importance = calibration.importance()[f"stack_{name}"]
        assert importance.shape == (how.experts, width)
        assert (importance[2] > 0).all()
        rows = calibration.activations(f"stack_{name}", 1)().astype(np.float64)
        np.testing.assert_allclose(importance[1], np.square(rows).mean(axis=0), rtol=2e-3)


def test_huge_activations_are_kept_beyond_float16(tmp_path):
    how = Spelling(halves="apart")
    feeds = [{"x": feed["x"] * np.float32(1e6)} for feed in tokens(how)]
    calibration = calibrate(block_model(how), tmp_path / "c", feeds=feeds)
    for expert, (x, hidden) in enumerate(evaluated(how, feeds)):
        np.testing.assert_allclose(calibration.activations("stack_gate", expert)(), x, rtol=1e-2, atol=1e3)
        np.testing.assert_allclose(calibration.activations("stack_down", expert)(), hidden, rtol=1e-2, atol=1e9)


def test_values_that_are_not_finite_are_refused(tmp_path):
    feeds = tokens(Spelling())
    feeds[1]["x"][3] = np.inf
    with pytest.raises(TargetError, match="infinity or NaN at"):
        calibrate(block_model(Spelling()), tmp_path / "c", feeds=feeds)
    assert not (tmp_path / "c").exists()


def test_weights_are_known_by_their_views_whatever_they_are_joined_to(tmp_path):
    how = Spelling(weights="own", halves="apart")
    model = io.own_copy(block_model(how))
    calibration = calibrate(model, tmp_path / "c", feeds=tokens(how))
    gate, up = (constant(model.graph.initializers[f"{name}_1"]).T for name in ("gate", "up"))
    both = interleaved(stacked([gate, gate]), stacked([up, up])).index(0, 1)
    assert calibration.of(both) == calibration.of(gate) == calibration.activations("up_1")
    assert calibration.of(gate.T) is None, "of 8 input features, and this has 6"
    other = constant(model.graph.initializers["gate_2"]).T
    assert calibration.of(joined([gate, other], 0, "two experts")) is None
    assert calibration.of(gate.slice(1, 0, 4)) is None, "half of the input features"
    assert calibration.of(gate.slice(0, 1, 3)) == calibration.of(gate)
