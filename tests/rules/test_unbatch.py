"""unbatch: a product with a stack of matrices becomes one for each, where the plan quantizes them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from linear_models import agrees, linear_model, nodes, quantized, weights
from support import histogram, run

PLAN = {"default": {"bits": 4, "block_size": 16}}
RULES = {
    "description": "A test.",
    "phases": [
        {"name": "unbatch", "rules": ["unbatch"]},
        {"name": "quantize", "rules": ["matmul-to-matmul-nbits"]},
    ],
    "quantization": PLAN,
}
ONLY = RULES | {"phases": RULES["phases"][:1]}


@pytest.mark.parametrize("x", [(3, "T", 32), (1, "T", 32), ("T", 32)])
def test_one_product_for_each_matrix(x):
    stack = weights(3, 32, 8)
    model = linear_model("y = MatMul(x, w)", {"w": stack}, x=x)
    array = weights(*(5 if d == "T" else d for d in x), seed=1)
    result = quantized(model, ONLY)
    assert result.report.applied == {"unbatch": 1}
    agrees(result, array @ stack, {"x": array})
    result = quantized(model, RULES)
    assert result.report.applied == {"unbatch": 1, "matmul-to-matmul-nbits": 3}
    assert len(nodes(result.ir_model, "MatMulNBits")) == 3 and not nodes(result.ir_model, "MatMul")
    assert not quantized(result.ir_model, RULES).report.applied


@pytest.mark.parametrize(
    ("body", "x", "reason"),
    [
        ("y = MatMul(x, w)", ("B", "T", 32), "the first extent of its input is unknown, not 3"),
        ("y = MatMul(x, w)", (2, 3, "T", 32), "the rank of its input is 4, not 2 or 3"),
        (
            "y = MatMul(x, w) z = ReduceMax(w)",
            (3, "T", 32),
            "the float weight would stay in the model: ReduceMax also reads it",
        ),
    ],
)
def test_declines(body, x, reason):
    model = linear_model(body, {"w": weights(3, 32, 8)}, x=x, outputs="y z" if "z =" in body else "y")
    before = histogram(model)
    result = quantized(model, ONLY)
    assert [r for _, r in result.report.declined] == [reason]
    assert histogram(result.ir_model) == before


def test_an_input_cut_at_a_computed_position():
    """As torch.onnx's TorchScript writes chunk(2, -1): shape inference tells nothing of such a Slice."""
    body = """s = Shape<start=2>(x) half = Div(s, two) a = Slice(x, zero, half, axis) b = Slice(x, half, s, axis)
    p = Mul(a, b) y = MatMul(p, w)"""
    numbers = {name: np.array([number]) for name, number in (("two", 2), ("zero", 0), ("axis", 2))}
    declared = ", ".join(f"int64[1] {name}" for name in numbers)
    stack, array = weights(3, 32, 8), weights(3, 5, 64, seed=1)
    text = f"g (float[3,T,64] x) => (float[3,T,8] y) <{declared}, float[3,32,8] w> {{ {body} }}"
    tensors = [ir.tensor(a, name=name) for name, a in (*numbers.items(), ("w", stack))]
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]> {text}', initializers=tensors)
    result = quantized(model, ONLY)
    assert result.report.applied == {"unbatch": 1}
    agrees(result, array[..., :32] * array[..., 32:] @ stack, {"x": array})


def test_what_the_plan_keeps_in_float_stays_together():
    model = linear_model("y = MatMul(x, w)", {"w": weights(3, 32, 8)}, x=(3, "T", 32))
    kept = ONLY | {"quantization": PLAN | {"exclude": [{"weights": "w"}]}}
    result = quantized(model, kept)
    assert not result.report.applied and result.report.declined
    array = weights(3, 4, 32, seed=1)
    assert np.array_equal(*(run(m, {"x": array})["y"] for m in (model, result.ir_model)))


def test_one_matrix_is_not_its_business():
    model = linear_model("y = MatMul(x, w)", {"w": weights(1, 32, 8)}, x=(1, "T", 32))
    assert not quantized(model, ONLY).report.declined
