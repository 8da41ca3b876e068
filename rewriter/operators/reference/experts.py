"""The arithmetic of a mixture of experts: routing, gated activations and the weighted sum. T tokens, E experts.

Source: the schemas of com.microsoft::MoE and QMoE; what they leave open is as ONNX Runtime's kernels do it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rewriter.operators.form import GLU
from rewriter.operators.reference.common import Array, Float32, malformed, unsupported

SPARSE_MIXER_JITTER = np.float32(0.01)
"""Relative distance below the top logit, halved, beyond which the sparse mixer leaves an expert out; fixed in ORT."""

Linear = Callable[[int, Float32], Float32]
"""``(expert, x [T', K]) -> [T', N]``: one projection of one expert."""


@dataclass(frozen=True)
class Attributes:
    """The attributes that MoE and QMoE share, under their own names."""

    k: int = 1
    activation_type: str = "relu"
    normalize_routing_weights: int = 0
    use_sparse_mixer: int = 0
    swiglu_fusion: int = 0
    swiglu_limit: float | None = None
    activation_alpha: float = 1.0
    activation_beta: float = 0.0

    @property
    def fused(self) -> int:
        """How many halves fc1 holds: 2 for a fused gate, else 1."""
        return 2 if self.activation_type in GLU and self.swiglu_fusion else 1


def route(
    operator: str, attributes: Attributes, logits: Float32, mixing: Float32 | None = None
) -> tuple[npt.NDArray[np.intp], Float32]:
    """Selects k experts for each token.

    Without normalisation the weights are those of the softmax over all experts, as MoE and CUDA's QMoE have it. (The
    CPU provider's QMoE ignores the attribute and always normalises.)

    Args:
        operator: named in errors.
        attributes: k, normalisation and sparse mixer.
        logits: [T, E]; selects.
        mixing: [T, E] weights taken instead of the softmax (QMoE's router_weights), or None.

    Returns:
        experts [T, k] and their weights [T, k].

    Raises:
        TargetError: a combination that ONNX Runtime does not define.
        ModelError: k is not within the number of experts.
    """
    experts = logits.shape[1]
    k = attributes.k
    if not 1 <= k <= experts:
        raise malformed(operator, f"k = {k} of {experts} experts")
    if attributes.use_sparse_mixer:
        if k != 2 or experts not in (8, 16) or mixing is not None:
            raise unsupported(operator, "a sparse mixer but for k = 2, 8 or 16 experts and no router_weights")
        return _sparse_mixer(logits)
    # Among equal logits the last expert wins, as in the CPU kernels; the schema leaves it open.
    selected = experts - 1 - np.argsort(-logits[:, ::-1], axis=-1, kind="stable")[:, :k]
    if mixing is not None:
        weights = np.take_along_axis(mixing, selected, axis=-1)
        if attributes.normalize_routing_weights:
            total = weights.sum(axis=-1, keepdims=True)
            weights = np.divide(weights, total, out=np.zeros_like(weights), where=total != 0)
        return selected, weights
    if attributes.normalize_routing_weights:
        return selected, _softmax(np.take_along_axis(logits, selected, axis=-1))
    return selected, np.take_along_axis(_softmax(logits), selected, axis=-1)


def mix(
    x: Float32, selected: npt.NDArray[np.intp], weights: Float32, expert: Callable[[int, Float32], Float32]
) -> Float32:
    """Returns the weighted sum [T, H] of the selected experts' outputs; an expert without tokens is never touched."""
    y = np.zeros_like(x)
    for index in np.unique(selected):
        tokens, slots = np.nonzero(selected == index)
        y[tokens] += weights[tokens, slots, None] * expert(int(index), x[tokens])
    return y


def require_activation(operator: str, attributes: Attributes) -> None:
    """Asked before any shape, of which an activation that nobody defines may have its own.

    Raises:
        TargetError: ONNX Runtime does not define the activation.
    """
    activation = attributes.activation_type
    if activation not in GLU and activation not in _ACTIVATIONS:
        raise unsupported(operator, f"activation_type '{activation}'")


def feed_forward(operator: str, attributes: Attributes, fc1: Linear, fc2: Linear, fc3: Linear | None) -> Linear:
    """Returns one expert: ``(expert, x [T', H]) -> [T', H]``.

    Raises:
        TargetError: a combination with fc3 that ONNX Runtime does not define.
        ModelError: an unfused gate without fc3.
    """
    activation = attributes.activation_type
    if attributes.swiglu_limit is not None and not attributes.swiglu_limit >= 0:
        raise malformed(operator, f"swiglu_limit={attributes.swiglu_limit}")
    if activation in GLU:
        if attributes.swiglu_fusion not in (0, 1, 2):
            raise unsupported(operator, f"swiglu_fusion={attributes.swiglu_fusion}")
        if attributes.swiglu_fusion and fc3 is not None:
            raise unsupported(operator, f"fc3 beside swiglu_fusion={attributes.swiglu_fusion}, which holds it in fc1")
        if not attributes.swiglu_fusion and activation == "geglu":
            raise unsupported(operator, "geglu with swiglu_fusion=0")
        if not attributes.swiglu_fusion and fc3 is None:
            raise malformed(operator, "swiglu_fusion=0 needs fc3")
    elif fc3 is not None and activation != "silu":
        raise unsupported(operator, f"fc3 with activation_type '{activation}': only silu and swiglu are gated")
    elif fc3 is not None and not _is_plain(attributes):
        raise unsupported(operator, "silu with fc3 and activation_alpha, activation_beta or swiglu_limit")

    def run(expert: int, x: Float32) -> Float32:
        h = fc1(expert, x)
        if activation in GLU:
            gate, linear = _halves(attributes, h, None if fc3 is None else fc3(expert, x))
            h = _gelu(gate) * linear if activation == "geglu" else _swiglu(attributes, gate, linear)
        else:
            h = _ACTIVATIONS[activation](h)
            if fc3 is not None:
                h = h * fc3(expert, x)
        return fc2(expert, h)

    return run


def flatten_tokens(operator: str, x: Array, name: str, width: int) -> Array:
    """Returns x [T, width] or [B, S, width] as [T, width].

    Raises:
        ModelError: another rank or width.
    """
    if x.ndim not in (2, 3) or x.shape[-1] != width:
        raise malformed(operator, f"{name} has shape {list(x.shape)}; expected [T, {width}] or [B, S, {width}]")
    return x.reshape(-1, width)


def _softmax(logits: Float32) -> Float32:
    raised = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=-1, keepdims=True), np.float32)


def _sparse_mixer(logits: Float32) -> tuple[npt.NDArray[np.intp], Float32]:
    """Phi-MoE's router: each of the two experts is weighed against its own near-ties, not against each other.

    Source: the kernel behind ``use_sparse_mixer`` in ONNX Runtime's CUDA provider; the CPU provider has none.
    """
    rows = np.arange(len(logits))
    remaining = logits.copy()
    selected, weights = [], []
    for _ in range(2):
        chosen = remaining.argmax(axis=-1)
        top = remaining[rows, chosen][:, None]
        far = top - logits > 2 * SPARSE_MIXER_JITTER * np.maximum(np.abs(logits), top)
        near = np.where(far, -np.inf, remaining)
        weights.append(_softmax(near)[rows, chosen])
        selected.append(chosen)
        remaining[rows, chosen] = -np.inf
    return np.stack(selected, axis=-1), np.stack(weights, axis=-1)


def _halves(attributes: Attributes, h: Float32, up: Float32 | None) -> tuple[Float32, Float32]:
    """Splits [T, 2 * I] into gate and linear, or takes the linear half from fc3."""
    if up is not None:
        return h, up
    if attributes.swiglu_fusion == 1:
        return h[:, 0::2], h[:, 1::2]
    half = h.shape[1] // 2
    return h[:, :half], h[:, half:]


def _swiglu(attributes: Attributes, gate: Float32, linear: Float32) -> Float32:
    if attributes.swiglu_limit is not None:
        limit = np.float32(attributes.swiglu_limit)
        gate = np.minimum(gate, limit)
        linear = np.clip(linear, -limit, limit)
    alpha, beta = np.float32(attributes.activation_alpha), np.float32(attributes.activation_beta)
    return gate * _sigmoid(alpha * gate) * (linear + beta)


def _sigmoid(x: Float32) -> Float32:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)), np.float32)


def _gelu(x: Float32) -> Float32:
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
    return np.asarray(0.5 * x * (1 + np.tanh(inner)), np.float32)


def _is_plain(attributes: Attributes) -> bool:
    limit = attributes.swiglu_limit
    unlimited = limit is None or math.isinf(limit)
    return attributes.activation_alpha == 1 and attributes.activation_beta == 0 and unlimited


_ACTIVATIONS: dict[str, Callable[[Float32], Float32]] = {
    "relu": lambda x: np.maximum(x, np.float32(0)),
    "relu2": lambda x: np.square(np.maximum(x, np.float32(0))),
    "gelu": _gelu,
    "silu": lambda x: x * _sigmoid(x),
    "identity": lambda x: x,
}
