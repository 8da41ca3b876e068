"""einsum-to-matmul: an Einsum with a weight that the plan quantizes becomes a MatMul with it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import settings
from linear_models import agrees, linear_model, nodes, quantized, weights
from support import histogram, run

from rewriter.testing import check_rule, near_misses, projections

PLAN = {"default": {"bits": 4, "block_size": 16}}
QUANTIZE = {"name": "quantize", "rules": ["matmul-to-matmul-nbits"]}
RULES = {
    "description": "A test.",
    "phases": [{"name": "products", "rules": ["einsum-to-matmul", "unbatch"]}, QUANTIZE],
    "quantization": PLAN,
}
ONLY = RULES | {"phases": [{"name": "products", "rules": ["einsum-to-matmul"]}]}


def model_of(equation, x, w, *, swapped=False, **how):
    operands = "(w, x)" if swapped else "(x, w)"
    return linear_model(f'y = Einsum<equation="{equation}">{operands}', {"w": w}, x=x, **how)


@pytest.mark.parametrize(
    ("equation", "x", "w", "moved"),
    [
        ("th,hi->ti", ("T", 32), (32, 24), {}),
        ("th,ih->ti", ("T", 32), (24, 32), {}),
        ("th,hi->it", ("T", 32), (32, 24), {"Transpose": 1}),
        ("ht,hi->ti", (32, "T"), (32, 24), {"Transpose": 1}),
        ("bth, hi -> bti", ("B", "T", 32), (32, 24), {}),
        ("bth,hi->tbi", ("B", "T", 32), (32, 24), {"Transpose": 1}),
        ("...h,hi->...i", ("B", "T", 32), (32, 24), {}),
        ("bth,nhd->btnd", ("B", "T", 32), (3, 32, 8), {"Reshape": 1}),
        ("bth,hnd->bntd", ("B", "T", 32), (32, 3, 8), {"Reshape": 1, "Transpose": 1}),
        ("bth,cnhd->cbtnd", ("B", "T", 32), (2, 3, 32, 8), {"Reshape": 1, "Transpose": 1}),
        ("btnd,ndh->bth", ("B", "T", 3, 16), (3, 16, 24), {"Reshape": 1}),
        ("bntd,ndh->bth", ("B", 3, "T", 16), (3, 16, 24), {"Reshape": 1, "Transpose": 1}),
        ("btnd,dnh->bth", ("B", "T", 3, 16), (16, 3, 24), {"Reshape": 1}),
        ("th,eih->eti", ("T", 32), (3, 24, 32), {"Reshape": 1, "Transpose": 1}),
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_one_product(equation, x, w, moved, swapped):
    if swapped:
        operands, _, out = equation.partition("->")
        equation = f"{','.join(operands.split(',')[::-1])}->{out}"
    weight = weights(*w)
    array = weights(*({"T": 5, "B": 2}.get(d, d) for d in x), seed=1)
    left, right = (weight, array) if swapped else (array, weight)
    model = model_of(equation, x, weight, swapped=swapped)
    result = quantized(model, ONLY)
    assert result.report.applied == {"einsum-to-matmul": 1}
    assert histogram(result.ir_model) == {"MatMul": 1} | moved
    agrees(result, np.einsum(equation, left, right), {"x": array})
    result = quantized(model, RULES)
    assert histogram(result.ir_model) == {"MatMulNBits": 1} | moved
    assert not quantized(result.ir_model, RULES).report.applied


@pytest.mark.parametrize(
    ("equation", "x", "w"),
    [
        ("eth,ehi->eti", (3, "T", 32), (3, 32, 24)),
        ("eth,eih->eti", (3, "T", 32), (3, 24, 32)),
        ("teh,ehi->tei", ("T", 3, 32), (3, 32, 24)),
        ("teh,hei->ite", ("T", 3, 32), (32, 3, 24)),
        ("etnd,ehnd->eth", (3, "T", 2, 16), (3, 24, 2, 16)),
    ],
)
def test_one_product_for_each_matrix_of_a_stack(equation, x, w):
    weight, array = weights(*w), weights(*(5 if d == "T" else d for d in x), seed=1)
    model = model_of(equation, x, weight)
    result = quantized(model, ONLY)
    assert histogram(result.ir_model)["MatMul"] == 1 and not nodes(result.ir_model, "Einsum")
    agrees(result, np.einsum(equation, array, weight), {"x": array})
    result = quantized(model, RULES)
    assert result.report.applied == {"einsum-to-matmul": 1, "unbatch": 1, "matmul-to-matmul-nbits": 3}
    assert not nodes(result.ir_model, "MatMul")


@pytest.mark.parametrize(
    ("body", "x", "w", "reason"),
    [
        ("th,hi->", ("T", 32), (32, 24), "Einsum 'th,hi->' is no product of matrices with the weight"),
        ("th,hi", ("T", 32), (32, 24), "Einsum 'th,hi' is no product of matrices with the weight"),
        ("th,hi->t", ("T", 32), (32, 24), "Einsum 'th,hi->t' is no product of matrices with the weight"),
        ("th,hi->thi", ("T", 32), (32, 24), "Einsum 'th,hi->thi' is no product of matrices with the weight"),
        ("tth,hi->ti", (32, 32, 32), (32, 24), "Einsum 'tth,hi->ti' is no product of matrices with the weight"),
        ("bth,hi->ti", ("B", "T", 32), (32, 24), "Einsum 'bth,hi->ti' is no product of matrices with the weight"),
        ("th,th->t", (24, 32), (24, 32), "Einsum 'th,th->t' is no product of matrices with the weight"),
        ("ebth,ebhi->ebti", (3, 2, "T", 32), (3, 2, 32, 24), "Einsum 'ebth,ebhi->ebti' is no product of matrices"),
        ("ebth,ehi->ebti", (3, "B", "T", 32), (3, 32, 24), "takes several dimensions of rows for each matrix"),
        ("th,hi->ti", ("T", 1), (32, 24), "'h' of 'th,hi->ti' is 1 in its input and 32 in the weight"),
        ("th,hi->ti", ("T", "H"), (32, 24), "'h' of 'th,hi->ti' is unknown in its input and 32 in the weight"),
        ("eth,ehi->eti", ("E", "T", 32), (3, 32, 24), "'e' of 'eth,ehi->eti' is unknown in its input and 3"),
        ("eth,ehi->eti", (3, "T", 32), (1, 32, 24), "'e' of 'eth,ehi->eti' is 3 in its input and 1 in the weight"),
    ],
)
def test_declines(body, x, w, reason):
    model = model_of(body, x, weights(*w))
    before = histogram(model)
    (decline,) = quantized(model, ONLY).report.declined
    assert reason in decline[1]
    assert histogram(model) == before


def test_a_weight_that_something_else_reads_stays():
    body = 'y = Einsum<equation="th,hi->ti">(x, w) z = ReduceMax(w)'
    model = linear_model(body, {"w": weights(32, 24)}, x=("T", 32), outputs="y z")
    ((_, reason),) = quantized(model, ONLY).report.declined
    assert reason == "the float weight would stay in the model: ReduceMax also reads it"


def test_a_weight_that_a_cast_widens_stays():
    body = 'v = Cast<to=1>(w) y = Einsum<equation="th,hi->ti">(x, v)'
    graph = f"g (float[T,32] x) => (float[T,24] y) <float16[32,24] w> {{ {body} }}"
    text = f'<ir_version: 10, opset_import: ["" : 21]> {graph}'
    model = ir.from_onnx_text(text, initializers=[ir.tensor(weights(32, 24, dtype=np.float16), name="w")])
    ((_, reason),) = quantized(model, ONLY).report.declined
    assert reason == "the weight is stored as FLOAT16, and a FLOAT view is larger"


def test_what_the_plan_keeps_in_float_stays():
    model = model_of("th,hi->ti", ("T", 32), weights(32, 24))
    result = quantized(model, ONLY | {"quantization": PLAN | {"exclude": [{"weights": "w"}]}})
    assert not result.report.applied and result.report.declined
    array = weights(4, 32, seed=1)
    assert np.array_equal(*(run(m, {"x": array})["y"] for m in (model, result.ir_model)))


@pytest.mark.parametrize("x", [(3, "T", 32), ("T", "H")])
def test_two_activations_are_not_its_business(x):
    equation = "eth,eth->et" if len(x) == 3 else "th,th->t"
    model = linear_model(f'y = Einsum<equation="{equation}">(x, x)', {}, x=x)
    assert not quantized(model, ONLY).report.declined


def test_parity_over_drawn_models():
    check_rule("einsum-to-matmul", projections(consumers=("einsum",)), settings=settings(max_examples=40))


def test_it_tells_near_misses():
    few = settings(max_examples=20, derandomize=True)
    near_misses("einsum-to-matmul", projections(consumers=("einsum",), typed=True, max_size=20), settings=few)
