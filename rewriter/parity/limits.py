"""What a user allows quantization to cost, held against what it did cost."""

from __future__ import annotations

import math

from rewriter.parity.model import ModelParity
from rewriter.report.quality import Quality
from rewriter.ruleset import ParitySettings


def exceeded(parity: ModelParity, limits: ParitySettings, expected: float = math.inf) -> tuple[str, ...]:
    """Returns one line for each limit that the outputs exceed, and for each output that is finite on one side only.

    Args:
        parity: how two models differ.
        limits: what the user allows.
        expected: relative L2 that what was done explains; held where the user sets no limit of it.
    """
    lines = []
    for name, metrics in parity.outputs.items():
        if math.isinf(metrics.max_abs):
            lines.append(
                f"output '{name}' of the original itself holds NaN or infinity, where the rewritten one differs"
                if metrics.undefined
                else f"output '{name}' is not finite where the original is"
            )
            continue
        if limited(limits) and not metrics.compared:
            lines.append(f"output '{name}' holds no finite number in either model, so no limit can be held")
            continue
        if limits.max_relative_l2 is not None and not metrics.relative_l2 <= limits.max_relative_l2:
            lines.append(f"output '{name}': relative L2 {metrics.relative_l2:.3g} is above {limits.max_relative_l2:g}")
        if limits.max_relative_l2 is None and not metrics.relative_l2 <= expected:
            lines.append(
                f"output '{name}': relative L2 {metrics.relative_l2:.3g} is far above what was quantized explains"
                f" ({expected:.2g}); parity.max_relative_l2 sets another limit"
            )
        if limits.min_snr_db is not None and not metrics.snr_db >= limits.min_snr_db:
            lines.append(f"output '{name}': SNR {metrics.snr_db:.1f} dB is below {limits.min_snr_db:g} dB")
        if limits.min_top1 is not None and metrics.top1 is not None and not metrics.top1 >= limits.min_top1:
            lines.append(f"output '{name}': top-1 agreement {metrics.top1:.3f} is below {limits.min_top1:g}")
    if limits.min_top1 is not None and parity.top1 is None:
        lines.append("top-1 agreement cannot be held: no output is named logits")
    return tuple(lines)


def limited(limits: ParitySettings) -> bool:
    return any(limit is not None for limit in (limits.max_relative_l2, limits.min_snr_db, limits.min_top1))


def too_far(found: Quality, max_kl: float | None, min_top1: float | None = None) -> tuple[str, ...]:
    """Returns one line for each limit that the predictions of a rewritten model exceed."""
    lines = []
    if max_kl is not None and not found.kl.value <= max_kl:
        lines.append(f"KL divergence {found.kl.value:.4g} is above {max_kl:g}")
    if min_top1 is not None and not found.top1.value >= min_top1:
        lines.append(f"top-1 agreement {found.top1.value:.2%} is below {min_top1:.2%}")
    return tuple(lines)
