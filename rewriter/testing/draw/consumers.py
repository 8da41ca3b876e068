"""What multiplies with a constant matrix, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from rewriter.testing.draw.graph import Scope
from rewriter.testing.draw.spellings import Matrix, Spelling, turn, unsqueeze

CONSUMERS = ("matmul", "matmul-rank3", "gemm", "gemm-bias", "gemm-scaled", "gemm-transA", "einsum", "left")
BIASES: dict[str, tuple[int | None, ...]] = {"row": (None,), "matrix": (1, None), "one": (1,), "scalar": ()}
"""Shapes of a Gemm's bias; None is N."""


@dataclass(frozen=True)
class Product:
    """The product [T, N] of x [T, K] and a constant matrix.

    Attributes:
        matrix: [K, N], or [N, K] where ``transposed``; with a leading 1 where its rank is 3.
        n: output features.
        dtype: of x and the matrix.
        how: says how the matrix is turned.
        consumer: one of ``CONSUMERS``.
        transposed: whether the matrix is stored [N, K].
    """

    matrix: Matrix
    n: int
    dtype: str
    how: Spelling
    consumer: str
    transposed: bool


def consume(draw: st.DrawFn, scope: Scope, x: str, product: Product) -> str:
    """Writes the product of ``x``; draws biases and factors."""
    matrix, transposed = product.matrix.name, product.transposed
    if product.consumer.startswith("gemm"):
        return _gemm(draw, scope, x, product)
    if product.consumer == "left":
        left = matrix if transposed else turn(scope, matrix, product.how.turn)
        return scope.op("Transpose", scope.op("MatMul", left, scope.op("Transpose", x)), perm=[1, 0])
    if product.consumer == "einsum" and scope.opset >= 12 and product.dtype != "float16":
        return scope.op("Einsum", x, matrix, equation="tk,nk->tn" if transposed else "tk,kn->tn")
    return _matmul(scope, x, product)  # Einsum is younger, and ONNX Runtime has no float16 kernel of it


def _matmul(scope: Scope, x: str, product: Product) -> str:
    weight, rank = product.matrix.name, product.matrix.rank
    if product.transposed and rank == 3:
        weight = scope.op("Transpose", weight, perm=[0, 2, 1])
    elif product.transposed:
        weight = turn(scope, weight, product.how.turn)
    if product.consumer == "matmul-rank3":
        x = unsqueeze(scope, x, (0,))
    out = scope.op("MatMul", x, weight)
    if product.consumer == "matmul-rank3" or rank == 3:
        out = scope.op("Reshape", out, scope.ints(-1, product.n))
    return out


def _gemm(draw: st.DrawFn, scope: Scope, x: str, product: Product) -> str:
    weight = product.matrix.name
    attributes: dict[str, Any] = {}
    if product.transposed and product.how.turn == "gemm":
        attributes["transB"] = 1
    elif product.transposed:
        weight = turn(scope, weight, product.how.turn)
    if product.consumer == "gemm-transA":
        x = scope.op("Transpose", x)
        attributes["transA"] = 1
    inputs = [x, weight]
    if product.consumer in ("gemm-bias", "gemm-scaled"):
        shape = BIASES[draw(st.sampled_from(tuple(BIASES)))]
        dims = [product.n if d is None else d for d in shape]
        inputs.append(scope.weight(f"bias{len(shape)}x{shape.count(None)}", dims, product.dtype))
    if product.consumer == "gemm-scaled":
        attributes[draw(st.sampled_from(("alpha", "beta")))] = 0.5
    return scope.op("Gemm", *inputs, **attributes)
