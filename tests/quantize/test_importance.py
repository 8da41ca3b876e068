from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import rewriter
from rewriter.errors import UsageError
from rewriter.quantize.importance import Importance

GRANITE = Path(__file__).parents[1] / "models" / "mobius" / "granitemoehybrid_static_unroll_f32.onnx"
STACK = "model.layers.0.block_sparse_moe.input_linear.weight"


def given_to_the_quantizer(**arguments):
    seen = {}

    def spy(weight, context):
        seen[context.weight] = context.importance
        return rewriter.quantize.ALGORITHMS["rtn"](weight, context)

    result = rewriter.apply(GRANITE, "experts-int4", quantizer=spy, **arguments)
    result.model.graph.initializers[f"{STACK}__slice_2_q4"].const_value.numpy()
    result.model.graph.initializers[f"{STACK}__slice_3_q4"].const_value.numpy()
    return seen


def test_importance_of_a_stack_reaches_each_expert(tmp_path):
    stack = np.random.default_rng(0).random((4, 64), dtype=np.float32)
    np.savez(tmp_path / "imatrix.npz", **{STACK: stack})
    seen = given_to_the_quantizer(imatrix=tmp_path / "imatrix.npz")
    assert np.array_equal(seen[f"{STACK}__slice_2"], stack[2]) and np.array_equal(seen[f"{STACK}__slice_3"], stack[3])


def test_importance_of_one_expert_comes_before_that_of_its_stack():
    own, stack = np.full(64, 2.0), np.ones(64)
    seen = given_to_the_quantizer(imatrix={STACK: stack, f"{STACK}__slice_2": own})
    assert np.array_equal(seen[f"{STACK}__slice_2"], own) and np.array_equal(seen[f"{STACK}__slice_3"], stack)


def test_importance_lowers_the_error_where_it_says():
    weights = np.ones(64)
    weights[:8] = 1e4
    where = f"{STACK}__slice_2"

    def error(imatrix):
        found = {}

        def keep(weight, context):
            quantized = rewriter.quantize.ALGORITHMS["mse-search"](weight, context)
            found[context.weight] = np.abs(quantized.dequantize() - weight)[:, :8].mean()
            return quantized

        result = rewriter.apply(GRANITE, "experts-int4", imatrix=imatrix, quantizer=keep)
        result.model.graph.initializers[f"{where}_q4"].const_value.numpy()
        return found[where]

    assert error({where: weights}) < error(None)


@pytest.mark.parametrize(
    ("imatrix", "message"),
    [
        ({"model.layers.0.block_sparse_moe.input_linear.wieght": np.ones(64)}, r"did you mean .*input_linear\.weight"),
        ({STACK: np.ones(63)}, "63 input features; the weight has 64"),
        ({STACK: np.ones((3, 64))}, "has 3 experts"),
        ({STACK: -np.ones(64)}, "negative"),
        ({STACK: np.full(64, np.nan)}, "not finite"),
        ({STACK: np.ones((1, 4, 64))}, r"give floats, \[K\] or \[E, K\]"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(imatrix, message):
    with pytest.raises(UsageError, match=message) as caught:
        rewriter.apply(GRANITE, "experts-int4", imatrix=imatrix)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_none(tmp_path):
    (tmp_path / "x.npz").write_text("no")
    for path in (tmp_path / "x.npz", tmp_path / "missing.npz"):
        with pytest.raises(UsageError, match="cannot be read"):
            Importance.read(path)
