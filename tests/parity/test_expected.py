"""The limit of a whole-model comparison that nobody set follows from what was quantized."""

from __future__ import annotations

import math

import pytest
from support import parse

from rewriter.parity.expected import expected_l2
from rewriter.parity.limits import exceeded
from rewriter.parity.model import ModelParity
from rewriter.report import Metrics, Weight
from rewriter.ruleset import ParitySettings

DENSE = "g (float[2,4] x) => (float[2,4] y) { y = Relu(x) }"
ROUTED = "g (float[2,4] x) => (float[2,k] y, int64[2,k] i) <int64[1] k = {2}> { y, i = TopK(x, k) }"


def weight(error, layer=0, role="mlp.up", name="w"):
    return Weight(name, "n", role, layer, None, (4, 4), "rtn", 4, 32, True, 64, 10, error)


@pytest.mark.parametrize(
    ("text", "errors", "quantized", "limit"),
    [
        (DENSE, [], False, 0.01),
        (DENSE, [0.08], True, 0.05 + 0.16),
        (ROUTED, [], True, 0.25),
        (ROUTED, [0.08], True, 0.25 + 0.16),
        (DENSE, [0.3] * 16, True, 1.0),
    ],
)
def test_the_limit(text, errors, quantized, limit):
    weights = [weight(error, layer) for layer, error in enumerate(errors)]
    assert expected_l2(parse(text), weights, quantized=quantized) == pytest.approx(limit)


def test_experts_of_a_layer_count_once():
    experts = [weight(0.08, role="expert.up", name=f"w{e}") for e in range(128)]
    assert expected_l2(parse(DENSE), experts, quantized=True) == pytest.approx(0.05 + 0.16)


def test_a_weight_that_is_read_in_turn_counts_each_time():
    steps = "\n".join(
        f"x{i + 1} = com.microsoft.MatMulNBits<K = 16, N = 16, bits = 4, block_size = 16>(x{i}, W, s)" for i in range(3)
    )
    model = parse(
        f"g (float[2,16] x0) => (float[2,16] x3) <uint8[16,1,8] W = {{{', '.join(['1'] * 128)}}},"
        f" float[16] s = {{{', '.join(['1'] * 16)}}}> {{ {steps} }}",
        domains=', "com.microsoft": 1',
    )
    assert expected_l2(model, [weight(0.08)], quantized=True) == pytest.approx(0.05 + 3 * 0.16)


@pytest.mark.parametrize(("set_", "expected", "fails"), [(None, 0.4, True), (None, 0.9, False), (0.9, 0.4, False)])
def test_it_is_held_where_the_user_sets_none(set_, expected, fails):
    found = ModelParity("cpu", 0, {"y": Metrics(0.83, 1.0, (0,), 0.5, 1.0)})
    lines = exceeded(found, ParitySettings(max_relative_l2=set_), expected)
    assert bool(lines) == fails
    assert not fails or "relative L2 0.83 is far above what was quantized explains (0.4)" in lines[0]
    assert not exceeded(found, ParitySettings(), math.inf)
