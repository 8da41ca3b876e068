"""What a mixture of experts computes, in float64: the expectation of a measurement. T tokens, E experts."""

from __future__ import annotations

import numpy as np

from probe.forms import MoEForm

_JITTER = 0.01
_HALVES = ("swiglu", "geglu")


def halves(form: MoEForm) -> int:
    """Returns how many halves fc1 holds."""
    return 2 if form.act in _HALVES and form.fusion and not form.fc3 else 1


def routed(form: MoEForm, logits: np.ndarray, given: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the experts [T, k] of each token and their weights [T, k]."""
    if form.sparse:
        return _sparse(logits)
    chosen = np.argsort(-logits, axis=1)[:, : form.top]
    weights = np.take_along_axis(_softmax(logits) if given is None else given, chosen, axis=1)
    return chosen, weights / weights.sum(axis=1, keepdims=True) if form.normalize else weights


def mixed(
    form: MoEForm,
    x: np.ndarray,
    routes: tuple[np.ndarray, np.ndarray],
    weights: list[np.ndarray],
    biases: list[np.ndarray] | None,
) -> np.ndarray:
    """Returns [T, H].

    Args:
        form: says the activation.
        x: [T, H].
        routes: experts and weights, [T, k] each.
        weights: fc1 [E, F * I, H], fc2 [E, H, I] and perhaps fc3 [E, I, H].
        biases: of these, [E, N] each, or None.
    """
    y = np.zeros(x.shape)
    for expert in range(len(weights[0])):
        tokens, slots = np.nonzero(routes[0] == expert)
        if not tokens.size:
            continue
        own = [w[expert] for w in weights]
        bias = [0.0] * len(weights) if biases is None else [b[expert] for b in biases]
        h = x[tokens] @ own[0].T + bias[0]
        other = x[tokens] @ own[2].T + bias[2] if len(own) > 2 else None
        out = _activated(form, h, other) @ own[1].T + bias[1]
        y[tokens] += routes[1][tokens, slots][:, None] * out
    return y


def _activated(form: MoEForm, h: np.ndarray, other: np.ndarray | None) -> np.ndarray:
    if form.act in _HALVES:
        half = h.shape[1] // 2
        gate, linear = (h, other) if other is not None else (h[:, 0::2], h[:, 1::2])
        if form.fusion == 2:
            gate, linear = h[:, :half], h[:, half:]
        if form.act == "geglu":
            return _gelu(gate) * linear
        alpha, beta, limit = map(float, form.constants.split(","))
        gate, linear = np.minimum(gate, limit), np.clip(linear, -limit, limit)
        return gate * _sigmoid(alpha * gate) * (linear + beta)
    kinds = {
        "relu": lambda v: np.maximum(v, 0),
        "relu2": lambda v: np.maximum(v, 0) ** 2,
        "gelu": _gelu,
        "silu": lambda v: v * _sigmoid(v),
        "identity": lambda v: v,
    }
    return kinds[form.act](h) * (1 if other is None else other)


def _sigmoid(v: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * v))


def _gelu(v: np.ndarray) -> np.ndarray:
    return 0.5 * v * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3)))


def _softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


def _sparse(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Phi-MoE's router: each of two experts is weighed against those close to it."""
    left, chosen, weights = logits.copy(), [], []
    for _ in range(2):
        best = left.argmax(axis=1)[:, None]
        top = np.take_along_axis(left, best, axis=1)
        far = (top - logits) / np.maximum(np.abs(logits), top) > 2 * _JITTER
        weights.append(np.take_along_axis(_softmax(np.where(far, -np.inf, left)), best, axis=1))
        chosen.append(best)
        np.put_along_axis(left, best, -np.inf, axis=1)
    return np.concatenate(chosen, axis=1), np.concatenate(weights, axis=1)
