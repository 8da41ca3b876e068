"""Activations: what a record says is what its spellings and the definition compute."""

import math

import numpy as np
import pytest

from rewriter.operators.activation import ACTIVATIONS, activation_of

X = np.linspace(-3, 3, 41, dtype=np.float32)
STEPS = {
    "relu": lambda x: np.maximum(x, 0),
    "clip": np.clip,
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
}


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda activation: activation.name)
def test_each_spelling_computes_the_function(activation):
    for steps in activation.spellings:
        spelled = X
        for name, *numbers in steps:
            spelled = STEPS[name](spelled, *numbers)
        np.testing.assert_allclose(activation.function(X), spelled, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda activation: activation.name)
def test_a_gate_multiplies_and_a_power_is_one(activation):
    linear = X[::-1].copy() if activation.gated else None
    found = activation.apply(X, linear, 1.0, 0.0, math.inf)
    expected = activation.function(X) ** activation.power * (1 if linear is None else linear)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert bool(activation.fusions) == activation.gated
    assert activation_of(activation.name) is activation
