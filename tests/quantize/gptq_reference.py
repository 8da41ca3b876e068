"""GPTQ in plain NumPy, row by row in float64: slow, and what the compiled loops are tested against."""

import ml_dtypes
import numpy as np
import reference

from rewriter.quantize import WeightContext, WeightSpec
from rewriter.quantize.formats import E2M1, FORMATS


def hessian(inputs, damping):
    h = inputs.T.astype(np.float64) @ inputs.astype(np.float64)
    h /= np.trace(h) / len(h)
    return h + damping * np.eye(len(h))


def rounded(weight, context: WeightContext, h):
    """Returns codes [N, K], scales and zero points [N, B] of plain GPTQ."""
    spec, (n, k) = context.spec, weight.shape
    block, top = spec.block_size or k, (1 << spec.bits) - 1
    factor = np.linalg.cholesky(np.linalg.inv(h)).T
    left = weight.astype(np.float64)
    codes, scales, zeros = np.empty((n, k)), np.empty((n, -(-k // block))), np.empty((n, -(-k // block)))
    for b in range(scales.shape[1]):
        columns = range(b * block, min((b + 1) * block, k))
        part = slice(columns.start, columns.stop)
        own = WeightContext(
            WeightSpec("mse-search", spec.bits, 0, spec.symmetric), context.scale_dtype, importance=np.diag(h)[part]
        )
        grid = reference.mse_search(left[:, part].astype(np.float32), own)
        scales[:, b] = grid.scales[:, 0]
        zeros[:, b] = (top + 1) // 2 if spec.symmetric else grid.zero_points[:, 0]
        for j in columns:
            for r in range(n):
                s, z = scales[r, b], zeros[r, b]
                codes[r, j] = np.clip(np.rint(left[r, j] / s + z), 0, top) if s else z
                error = (left[r, j] - (codes[r, j] - z) * s) / factor[j, j]
                left[r, j + 1 :] -= error * factor[j, j + 1 :]
    return codes, scales, zeros


def descended(weight, codes, scales, zeros, block, top, h, sweeps):
    """Returns the codes after each has moved to where the error is least while all others stay."""
    codes = codes.copy()
    for r in range(len(codes)):
        s, z = (np.repeat(a[r], block)[: codes.shape[1]] for a in (scales, zeros))
        for _ in range(sweeps):
            for j in range(codes.shape[1]):
                rest = weight[r] - (codes[r] - z) * s
                if s[j]:
                    codes[r, j] = np.clip(np.rint(codes[r, j] + h[j] @ rest / (h[j, j] * s[j])), 0, top)
    return codes


def refitted(weight, codes, scales, zeros, block, h):
    """Returns the scales after each has moved to where the error is least while all others stay."""
    scales = scales.copy()
    for r in range(len(codes)):
        z = np.repeat(zeros[r], block)[: codes.shape[1]]
        for b in range(scales.shape[1]):
            levels = np.where(np.arange(codes.shape[1]) // block == b, codes[r] - z, 0)
            rest = weight[r] - (codes[r] - z) * np.repeat(scales[r], block)[: codes.shape[1]]
            if levels.any():
                scales[r, b] += levels @ h @ rest / (levels @ h @ levels)
    return scales


def cost(weight, codes, scales, zeros, block, h):
    """Returns the error of each row."""
    k = codes.shape[1]
    rest = weight - (codes - np.repeat(zeros, block, 1)[:, :k]) * np.repeat(scales, block, 1)[:, :k]
    return np.einsum("ri,ij,rj->r", rest, h, rest)


def rounded_floats(weight, name, global_scale, h):
    """Returns codes of e2m1 [N, K] of plain GPTQ, and what the codes of each block are multiplied with, [N, B]."""
    block, factor = FORMATS[name].block, np.linalg.cholesky(np.linalg.inv(h)).T
    left, levels = weight.astype(np.float64), np.array(E2M1)
    codes, scales = np.empty(weight.shape, np.uint8), np.empty((len(weight), -(-weight.shape[1] // block)))
    for j in range(weight.shape[1]):
        b = j // block
        if j % block == 0:
            part = slice(j, j + block)
            scales[:, b] = [best_float_scale(row, np.diag(h)[part], name, global_scale) for row in left[:, part]]
        codes[:, j] = nearest_levels(left[:, j] / scales[:, b])
        error = (left[:, j] - levels[codes[:, j]] * scales[:, b]) / factor[j, j]
        left[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :]
    return codes, scales


def best_float_scale(values, weights, name, global_scale):
    """The scale of least weighted error among the plain one of the format and its neighbours."""
    peak = np.abs(values).max()
    if name == "mxfp4":
        tried = 2.0 ** (np.floor(np.log2(peak)) - 2 + np.array([0, -1, 1]))
    else:
        all_scales = np.arange(1, 127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        middle = int(np.abs(all_scales - peak / 6 / global_scale).argmin())
        tried = all_scales[max(middle - 8, 0) : middle + 9] * global_scale
    levels = np.array(E2M1)
    errors = [weights @ (levels[nearest_levels(values / scale)] * scale - values) ** 2 for scale in tried]
    return tried[int(np.argmin(errors))]


def nearest_levels(values):
    """Returns the nearest codes of e2m1, ties to even."""
    return values.astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15


def descended_floats(weight, codes, scales, block, h, sweeps):
    """As ``descended``, of codes of e2m1."""
    codes, levels = codes.copy(), np.array(E2M1)
    for r in range(len(codes)):
        s = np.repeat(scales[r], block)[: codes.shape[1]]
        for _ in range(sweeps):
            for j in range(codes.shape[1]):
                rest = weight[r] - levels[codes[r]] * s
                codes[r, j] = nearest_levels(levels[codes[r, j]] + h[j] @ rest / (h[j, j] * s[j]))
    return codes


def cost_floats(weight, codes, scales, block, h):
    """Returns the error of each row."""
    rest = weight - np.array(E2M1)[codes] * np.repeat(scales, block, 1)[:, : codes.shape[1]]
    return np.einsum("ri,ij,rj->r", rest, h, rest)
