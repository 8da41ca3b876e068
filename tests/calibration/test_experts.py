"""What the experts of a block saw, against NumPy's evaluation of the same block."""

from __future__ import annotations

import numpy as np
import pytest
from block_models import Spelling, block_arrays, block_model

from rewriter.calibration import Calibration
from rewriter.calibration.capture import calibrate

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
]


def tokens(how, count=23, seed=5):
    """x [T, H], or [B, S, H], in two runs."""
    x = np.random.default_rng(seed).standard_normal((2, count, how.hidden)).astype(how.dtype)
    return [{"x": part if how.rank == 2 else part[None]} for part in x]


def evaluated(how, feeds):
    """By expert: what gate and up saw, and what down saw."""
    w = {name: array.astype(np.float64) for name, array in block_arrays(how).items()}
    x = np.concatenate([feed["x"].reshape(-1, how.hidden) for feed in feeds]).astype(np.float64)
    scores = x @ w["router"]
    if how.router == "biased":
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
    silu = gate / (1 + np.exp(-gate))
    return silu if kind == "silu" else silu * up


def stored(how, name, expert):
    """Where the model keeps a matrix of one expert."""
    if name != "down" and how.halves != "apart" and how.activation not in ("silu", "relu"):
        name = "both"
    return (f"{name}_{expert}", None) if how.weights.startswith("own") else (f"stack_{name}", expert)


@pytest.mark.parametrize("how", SPELLINGS, ids=str)
def test_each_expert_has_the_rows_that_it_saw(how, tmp_path):
    feeds = tokens(how)
    calibrate(block_model(how), tmp_path / "c", feeds=feeds)
    calibration = Calibration.open(tmp_path / "c")
    bound = 4e-3 if how.dtype == "float16" else 1e-3
    for expert, (x, hidden) in enumerate(evaluated(how, feeds)):
        for name, expected in (("gate", x), ("up", x), ("down", hidden)):
            if name == "up" and how.activation in ("silu", "relu"):
                continue
            seen = calibration.activations(*stored(how, name, expert))
            assert seen.count == len(expected)
            np.testing.assert_allclose(seen(), expected, rtol=bound, atol=bound)
    (choice,) = calibration.choices
    assert sum(choice.counts) == 46 * how.k
