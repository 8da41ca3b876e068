"""The arithmetic of a mixture of experts: routing, gated activations and the weighted sum. T tokens, E experts.

Source: the schemas of com.microsoft::MoE and QMoE; what they leave open is as ONNX Runtime's kernels do it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from rewriter.operators.activation import Activation, activation_of
from rewriter.operators.form import ExpertForm
from rewriter.operators.reference.common import Array, Float32, malformed, unsupported

SPARSE_MIXER_JITTER = np.float32(0.01)
"""Relative distance below the top logit, halved, beyond which the sparse mixer leaves an expert out; fixed in ORT."""

Linear = Callable[[int, Float32], Float32]
"""``(expert, x [T', K]) -> [T', N]``: one projection of one expert."""


def route(
    operator: str, form: ExpertForm, logits: Float32, mixing: Float32 | None = None
) -> tuple[npt.NDArray[np.intp], Float32]:
    """Selects k experts for each token.

    Without normalisation the weights are those of the softmax over all experts, as MoE and CUDA's QMoE have it. (The
    CPU provider's QMoE ignores the attribute and always normalises.)

    Args:
        operator: named in errors.
        form: k, normalisation and sparse mixer.
        logits: [T, E]; selects.
        mixing: [T, E] weights taken instead of the softmax (QMoE's router_weights), or None.

    Returns:
        experts [T, k] and their weights [T, k].

    Raises:
        TargetError: a combination that ONNX Runtime does not define.
        ModelError: k is not within the number of experts.
    """
    experts = logits.shape[1]
    k = form.k
    if not 1 <= k <= experts:
        raise malformed(operator, f"k = {k} of {experts} experts")
    if form.sparse_mixer:
        if k != 2 or experts not in (8, 16) or mixing is not None:
            raise unsupported(operator, "a sparse mixer but for k = 2, 8 or 16 experts and no router_weights")
        return _sparse_mixer(logits)
    # Among equal logits the last expert wins, as in the CPU kernels; the schema leaves it open.
    selected = experts - 1 - np.argsort(-logits[:, ::-1], axis=-1, kind="stable")[:, :k]
    if mixing is not None:
        weights = np.take_along_axis(mixing, selected, axis=-1)
        if form.normalize:
            total = weights.sum(axis=-1, keepdims=True)
            weights = np.divide(weights, total, out=np.zeros_like(weights), where=total != 0)
        return selected, weights
    if form.normalize:
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


def require_activation(operator: str, form: ExpertForm) -> Activation:
    """Returns the activation; asked before any shape, of which one that nobody defines may have its own.

    Raises:
        TargetError: ONNX Runtime does not define the activation.
    """
    known = activation_of(form.activation)
    if known is None:
        raise unsupported(operator, f"activation_type '{form.activation}'")
    return known


def feed_forward(operator: str, form: ExpertForm, fc1: Linear, fc2: Linear, fc3: Linear | None) -> Linear:
    """Returns one expert: ``(expert, x [T', H]) -> [T', H]``.

    Raises:
        TargetError: a combination with fc3 that ONNX Runtime does not define.
        ModelError: an unfused gate without fc3.
    """
    activation = require_activation(operator, form)
    fusion = form.fusion
    if not form.limit >= 0:
        raise malformed(operator, f"swiglu_limit={form.limit}")
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
    elif fc3 is not None and (form.alpha, form.beta, form.limit) != (1, 0, math.inf):
        raise unsupported(operator, "silu with fc3 and activation_alpha, activation_beta or swiglu_limit")

    def run(expert: int, x: Float32) -> Float32:
        gate, linear = fc1(expert, x), None if fc3 is None else fc3(expert, x)
        if activation.gated and linear is None:
            gate, linear = _halves(fusion, gate)
        return fc2(expert, activation.apply(gate, linear, form.alpha, form.beta, form.limit))

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
