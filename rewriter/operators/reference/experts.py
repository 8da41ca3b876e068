"""The arithmetic of a mixture of experts: routing, gated activations and the weighted sum. T tokens, E experts.

Source: the schemas of com.microsoft::MoE and QMoE; what they leave open is as ONNX Runtime's kernels do it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rewriter.operators.activation import Activation, activation_of
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
        known = activation_of(self.activation_type)
        return 2 if known is not None and known.gated and self.swiglu_fusion else 1


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


def require_activation(operator: str, attributes: Attributes) -> Activation:
    """Returns the activation; asked before any shape, of which one that nobody defines may have its own.

    Raises:
        TargetError: ONNX Runtime does not define the activation.
    """
    known = activation_of(attributes.activation_type)
    if known is None:
        raise unsupported(operator, f"activation_type '{attributes.activation_type}'")
    return known


def feed_forward(operator: str, attributes: Attributes, fc1: Linear, fc2: Linear, fc3: Linear | None) -> Linear:
    """Returns one expert: ``(expert, x [T', H]) -> [T', H]``.

    Raises:
        TargetError: a combination with fc3 that ONNX Runtime does not define.
        ModelError: an unfused gate without fc3.
    """
    activation = require_activation(operator, attributes)
    fusion = attributes.swiglu_fusion
    if attributes.swiglu_limit is not None and not attributes.swiglu_limit >= 0:
        raise malformed(operator, f"swiglu_limit={attributes.swiglu_limit}")
    if activation.gated:
        if fusion and fc3 is not None and fusion in activation.fusions:
            raise unsupported(operator, f"fc3 beside swiglu_fusion={fusion}, which holds it in fc1")
        if fusion not in activation.fusions:
            raise unsupported(operator, f"{activation.name} with swiglu_fusion={fusion}")
        if not fusion and fc3 is None:
            raise malformed(operator, "swiglu_fusion=0 needs fc3")
    elif fc3 is not None and not activation.fc3:
        gated = "only silu and swiglu are gated"
        raise unsupported(operator, f"fc3 with activation_type '{activation.name}': {gated}")
    elif fc3 is not None and not _is_plain(attributes):
        raise unsupported(operator, "silu with fc3 and activation_alpha, activation_beta or swiglu_limit")
    limit = math.inf if attributes.swiglu_limit is None else attributes.swiglu_limit

    def run(expert: int, x: Float32) -> Float32:
        gate, linear = fc1(expert, x), None if fc3 is None else fc3(expert, x)
        if activation.gated and linear is None:
            gate, linear = _halves(fusion, gate)
        return fc2(
            expert, activation.apply(gate, linear, attributes.activation_alpha, attributes.activation_beta, limit)
        )

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


def _halves(fusion: int, h: Float32) -> tuple[Float32, Float32]:
    """Splits [T, 2 * I] into gate and linear half."""
    if fusion == 1:
        return h[:, 0::2], h[:, 1::2]
    half = h.shape[1] // 2
    return h[:, :half], h[:, half:]


def _is_plain(attributes: Attributes) -> bool:
    limit = attributes.swiglu_limit
    unlimited = limit is None or math.isinf(limit)
    return attributes.activation_alpha == 1 and attributes.activation_beta == 0 and unlimited
