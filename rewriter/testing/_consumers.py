"""What multiplies with one expert's matrix, and how."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from rewriter.testing._graph import Scope
from rewriter.testing._spellings import Matrix, Spelling, turn, unsqueeze

CONSUMERS = ("matmul", "matmul-rank3", "gemm", "gemm-bias", "gemm-scaled", "gemm-transA", "einsum", "left")
BIASES: dict[str, tuple[int | None, ...]] = {"row": (None,), "matrix": (1, None), "one": (1,), "scalar": ()}
"""Shapes of a Gemm's bias; None is N."""


def consume(
    draw: st.DrawFn,
    scope: Scope,
    x: str,
    matrix: Matrix,
    size: tuple[int, int],
    dtype: str,
    how: Spelling,
    consumer: str,
    *,
    transposed: bool,
) -> str:
    """Writes the product [T, N] of x [T, K] and a matrix.

    Args:
        draw: draws biases and factors.
        scope: where it is written.
        x: the activations.
        matrix: [K, N], or [N, K] where ``transposed``; with a leading 1 where its rank is 3.
        size: (K, N).
        dtype: of x and the matrix.
        how: says how the matrix is turned.
        consumer: one of ``CONSUMERS``.
        transposed: whether the matrix is stored [N, K].
    """
    if consumer == "einsum" and (scope.opset < 12 or dtype == "float16"):
        consumer = "matmul"  # Einsum is younger, and ONNX Runtime has no float16 kernel of it
    if consumer == "einsum":
        return scope.op("Einsum", x, matrix.name, equation="tk,nk->tn" if transposed else "tk,kn->tn")
    if consumer == "left":
        left = matrix.name if transposed else turn(scope, matrix.name, how.turn)
        return scope.op("Transpose", scope.op("MatMul", left, scope.op("Transpose", x)), perm=[1, 0])
    if consumer.startswith("gemm"):
        return _gemm(draw, scope, x, matrix, size, dtype, how, consumer, transposed)
    return _matmul(scope, x, matrix, size, how, consumer, transposed)


def _matmul(
    scope: Scope, x: str, matrix: Matrix, size: tuple[int, int], how: Spelling, consumer: str, transposed: bool
) -> str:
    weight = matrix.name
    if transposed and matrix.rank == 3:
        weight = scope.op("Transpose", weight, perm=[0, 2, 1])
    elif transposed:
        weight = turn(scope, weight, how.turn)
    if consumer == "matmul-rank3":
        x = unsqueeze(scope, x, (0,))
    product = scope.op("MatMul", x, weight)
    if consumer == "matmul-rank3" or matrix.rank == 3:
        product = scope.op("Reshape", product, scope.ints(-1, size[1]))
    return product


def _gemm(
    draw: st.DrawFn,
    scope: Scope,
    x: str,
    matrix: Matrix,
    size: tuple[int, int],
    dtype: str,
    how: Spelling,
    consumer: str,
    transposed: bool,
) -> str:
    weight = matrix.name
    attributes: dict[str, Any] = {}
    if transposed and how.turn == "gemm":
        attributes["transB"] = 1
    elif transposed:
        weight = turn(scope, weight, how.turn)
    if consumer == "gemm-transA":
        x = scope.op("Transpose", x)
        attributes["transA"] = 1
    inputs = [x, weight]
    if consumer in ("gemm-bias", "gemm-scaled"):
        shape = BIASES[draw(st.sampled_from(tuple(BIASES)))]
        dims = [size[1] if d is None else d for d in shape]
        inputs.append(scope.weight(f"bias{len(shape)}x{shape.count(None)}", dims, dtype))
    if consumer == "gemm-scaled":
        attributes[draw(st.sampled_from(("alpha", "beta")))] = 0.5
    return scope.op("Gemm", *inputs, **attributes)
