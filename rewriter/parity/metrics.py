"""How far apart two arrays are."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from rewriter.errors import ParityError
from rewriter.report import Metrics

__all__ = ["Metrics", "compare"]

Array = npt.NDArray[np.generic]
Doubles = npt.NDArray[np.float64]


def compare(expected: Array, actual: Array, *, logits: bool = False) -> Metrics:
    """Measures one output.

    Args:
        expected: what it should be; numbers or booleans.
        actual: what it is; the same shape.
        logits: [..., V] scores, of which the largest and the softmax matter.

    Raises:
        ParityError: the shapes differ.
    """
    if expected.shape != actual.shape:
        raise ParityError(f"shapes differ: {list(expected.shape)} expected, {list(actual.shape)} found")
    e, a = expected.astype(np.float64), actual.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        same = (e == a) | (np.isnan(e) & np.isnan(a))
        finite = np.isfinite(e) & np.isfinite(a)
        broken = ~same & ~finite
        difference = np.abs(np.where(same, 0.0, a - e))
    top1, kl = _distribution(e, a) if logits and e.ndim > 0 and e.size and not broken.any() else (None, None)
    share = float(finite.mean()) if finite.size else 1.0
    if broken.any():
        index = _index(int(np.argmax(broken)), e.shape)
        top1, kl = (0.0, math.inf) if logits else (None, None)
        undefined = not np.isfinite(e[broken]).any()
        return Metrics(math.inf, math.inf, index, 0.0, -math.inf, top1, kl, share, undefined)
    if same.all():
        return Metrics(0.0, 0.0, (), 1.0, math.inf, top1, kl, share)
    e, a = e[finite], a[finite]
    worst = int(np.argmax(difference))
    size, error, other = (float(np.linalg.norm(v)) for v in (e, difference[finite], a))
    return Metrics(
        relative_l2=error / size if size else math.inf,
        max_abs=float(difference.reshape(-1)[worst]),
        worst_index=_index(worst, difference.shape),
        cosine=float(np.clip(np.dot(e / size, a / other), -1.0, 1.0)) if size and other else 0.0,
        snr_db=20 * math.log10(size / error) if size and error else (math.inf if not error else -math.inf),
        top1=top1,
        kl=kl,
        finite=share,
    )


def _distribution(expected: Doubles, actual: Doubles) -> tuple[float, float]:
    """Top-1 agreement and mean KL divergence over the rows whose largest element is finite."""
    e, a = (v.reshape(-1, v.shape[-1]) for v in (expected, actual))
    peaked = np.isfinite(e.max(axis=1))
    if not peaked.any():
        return 1.0, 0.0
    e, a = e[peaked], a[peaked]
    top1 = float(np.mean(np.argmax(e, axis=1) == np.argmax(a, axis=1)))
    log_e, log_a = log_softmax(e), log_softmax(a)
    p = np.exp(log_e)
    with np.errstate(invalid="ignore"):
        terms = np.where(p > 0, p * (log_e - log_a), 0.0)
    return top1, max(float(np.mean(terms.sum(axis=1))), 0.0)


def log_softmax(rows: Doubles) -> Doubles:
    """Returns log(softmax) of each row of scores [T, V]."""
    shifted = rows - rows.max(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        result: Doubles = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def _index(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(flat, shape))
