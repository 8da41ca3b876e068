"""The algorithms in plain NumPy, block by block in float64: slow, and what the compiled kernels are tested against."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from rewriter.quantize.types import FloatArray, QuantizedWeight, WeightContext

Block = npt.NDArray[np.float64]
Store = Callable[[float], float]
Fit = Callable[[Block, Block, int, bool, Store], tuple[float, int]]

STEPS = np.arange(-7, 8, 2) / 8
CLIP = {15: np.geomspace(0.96, 1.16, 4), 255: np.geomspace(0.985, 1.03, 6)}
CLIP_FEW = np.geomspace(0.94, 1.4, 6)
COARSE, FINE, LAST = np.geomspace(0.94, 6.7, 7), np.geomspace(0.74, 1.35, 6), np.geomspace(0.92, 1.09, 5)
FINE_4_BITS, LAST_4_BITS = np.geomspace(0.82, 1.23, 8), np.geomspace(0.95, 1.05, 7)
COARSE_8_BITS, FINE_8_BITS = np.geomspace(0.93, 1.4, 12), np.geomspace(0.94, 1.05, 24)
LAST_8_BITS = np.geomspace(0.997, 1.003, 7)


def rtn(weight: FloatArray, context: WeightContext) -> QuantizedWeight:
    """Round to nearest in the range of each block."""

    def fit(x: Block, w: Block, top: int, symmetric: bool, store: Store) -> tuple[float, int]:
        scale, zero = plain_grid(x, top, symmetric)
        return store(scale), zero

    return _quantize(weight, context, fit)


def k_quant(weight: FloatArray, context: WeightContext) -> QuantizedWeight:
    """The best weighted least-squares line through the codes of 8 grids, then the best scale for two zero points."""

    def fit(x: Block, w: Block, top: int, symmetric: bool, store: Store) -> tuple[float, int]:
        plain, plain_zero = plain_grid(x, top, symmetric)
        weights = w * (np.sqrt(np.mean(x * x)) + np.abs(x))
        zero = plain_zero
        if symmetric:
            _, scale = best_scale(x, weights, plain / (1 + STEPS / ((top + 1) // 2)), zero, top)
        else:
            scale, start = best_line(x, weights, plain / (1 + STEPS / top), top)
            zero = int(np.clip(np.rint(-start / scale), 0, top))
        starts = [(scale, zero)] if symmetric else [(scale, zero), (plain, plain_zero)]
        return better(x, w, starts, (plain, plain_zero), CLIP.get(top, CLIP_FEW), top, store)

    return _quantize(weight, context, fit)


def mse_search(weight: FloatArray, context: WeightContext) -> QuantizedWeight:
    """The scale and integer zero point of least error, walking from zero point to better zero point."""

    def fit(x: Block, w: Block, top: int, symmetric: bool, store: Store) -> tuple[float, int]:
        plain, plain_zero = plain_grid(x, top, symmetric)
        half = (top + 1) // 2
        coarse, fine = COARSE_8_BITS if top == 255 else COARSE, {15: FINE_4_BITS, 255: FINE_8_BITS}.get(top, FINE)
        starts = [plain_zero] if not symmetric else [half] if top == 7 else [half, half - 1]
        best = (np.inf, plain, plain_zero)
        for start in starts:
            widest = max(-min(x.min(), 0) / max(start, 1), max(x.max(), 0) / max(top - start, 1))
            _, around = best_scale(x, w, widest / coarse, start, top)

            def search(zero: int, around: float = around) -> tuple[float, float, int]:
                return *best_scale(x, w, around / fine, zero, top), zero

            tried = [start] if symmetric else [start, min(start + 1, top), max(start - 1, 0)]
            best = min(best, *map(search, tried), key=lambda found: found[0])
            last = start
            while not symmetric and best[2] != last and 0 <= 2 * best[2] - last <= top:
                beyond, last = search(2 * best[2] - last), best[2]
                best = min(best, beyond, key=lambda found: found[0])
        last_steps = {15: LAST_4_BITS, 255: LAST_8_BITS}.get(top, LAST)
        return better(x, w, [best[1:]], (plain, plain_zero), last_steps, top, store)

    return _quantize(weight, context, fit)


def plain_grid(x: Block, top: int, symmetric: bool) -> tuple[float, int]:
    """Returns scale and zero point of round-to-nearest; a zero point of half - 1 mirrors a negative scale."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    half = (top + 1) // 2
    if symmetric and top == 7:  # of which no runtime takes negative scales
        return max(-low / half, high / (half - 1)), half
    if symmetric:
        return max(-low, high) / half, half if -low >= high else half - 1
    # The float32 operations decide where halves fall.
    scale = np.float32(np.float32(high) - np.float32(low)) / np.float32(top)
    return float(scale), int(_round_half_away(-np.float32(low) / scale))


def better(
    x: Block, w: Block, starts: list[tuple[float, int]], plain: tuple[float, int], steps: Block, top: int, store: Store
) -> tuple[float, int]:
    """Returns the best of grids, each scale the best of neighbours and refitted, and a plain one."""
    found = [
        (*refit(x, w, best_scale(x, w, scale / steps, zero, top)[1], zero, top, store), zero) for scale, zero in starts
    ]
    found.insert(0, (*refit(x, w, *plain, top, store, rounds=1), plain[1]))
    return min(found, key=lambda grid: grid[0])[1:]


def refit(x: Block, w: Block, scale: float, zero: int, top: int, store: Store, rounds: int = 2) -> tuple[float, float]:
    """Returns the least error and the stored scale met while alternating between codes and least-squares scale."""
    error, best = np.inf, 0.0
    for _ in range(rounds):
        scale = store(scale)
        if scale == 0:
            break
        t = _levels(x, scale, zero, top)
        this = float(np.sum(w * (x - scale * t) ** 2))
        if this < error:
            error, best = this, scale
        scale = _least_squares(x, w, t, scale)
    return error, best


def best_scale(x: Block, w: Block, scales: Block, zero: int, top: int) -> tuple[float, float]:
    """Returns the error and the least-squares scale of the best of the scales' codes."""
    levels = [_levels(x, scale, zero, top) for scale in scales]
    fitted = [_least_squares(x, w, t, scale) for t, scale in zip(levels, scales, strict=True)]
    errors = [np.sum(w * (x - scale * t) ** 2) for t, scale in zip(levels, fitted, strict=True)]
    best = int(np.argmin(errors))
    return float(errors[best]), float(fitted[best])


def best_line(x: Block, w: Block, scales: Block, top: int) -> tuple[float, float]:
    """Returns slope and start of the best of the least-squares lines through the scales' codes."""
    low = min(float(x.min()), 0.0)
    lines = []
    for scale in scales:
        t = np.clip(np.rint((x - low) / scale), 0, top)
        spread = w.sum() * (w * t * t).sum() - (w * t).sum() ** 2
        if spread > 1e-6 * w.sum() * (w * t * t).sum():
            slope = (w.sum() * (w * t * x).sum() - (w * t).sum() * (w * x).sum()) / spread
            start = ((w * t * t).sum() * (w * x).sum() - (w * t).sum() * (w * t * x).sum()) / spread
        else:
            slope, start = float(scale), low
        lines.append((float(np.sum(w * (x - slope * t - start) ** 2)), slope, start))
    _, slope, start = min(lines, key=lambda line: line[0])
    return slope, start


def _quantize(weight: FloatArray, context: WeightContext, fit: Fit) -> QuantizedWeight:
    spec = context.spec
    n, k = weight.shape
    block = spec.block_size or k
    top, half = (1 << spec.bits) - 1, 1 << (spec.bits - 1)
    values = weight.astype(np.float32)
    importance = np.ones(k) if context.importance is None else context.importance.astype(np.float64)
    codes = np.empty((n, k), np.uint8)
    scales = np.empty((n, -(-k // block)), context.scale_dtype)
    zeros = np.empty(scales.shape, np.uint8)

    def store(scale: float) -> float:
        return float(np.float32(scale).astype(context.scale_dtype))

    for r, b in np.ndindex(*scales.shape):
        part = slice(b * block, (b + 1) * block)
        x = values[r, part]
        scale, zero = 0.0, half if spec.symmetric else 0
        if x.any():
            scale, zero = fit(x.astype(np.float64), importance[part], top, spec.symmetric, store)
            if spec.symmetric and zero != half:
                scale, zero = -scale, half
        inverse = np.float32(1) / np.float32(scale) if scale else np.float32(0)
        codes[r, part] = _round_half_away(np.clip(x * inverse + np.float32(zero), 0, top))
        scales[r, b], zeros[r, b] = scale, zero
    return QuantizedWeight(codes, scales, None if spec.symmetric else zeros, spec.bits, spec.block_size)


def _levels(x: Block, scale: float, zero: int, top: int) -> Block:
    return np.clip(np.rint(x / scale), -zero, top - zero)


def _least_squares(x: Block, w: Block, t: Block, scale: float) -> float:
    power = float(np.sum(w * t * t))
    return float(np.sum(w * t * x)) / power if power else scale


def _round_half_away(x: npt.NDArray[np.floating] | np.floating) -> npt.NDArray[np.floating]:
    floor = np.floor(x)
    return np.asarray(floor + (x - floor >= 0.5))
