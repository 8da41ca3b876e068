"""What rewriter.apply and its result are given in error is refused in one line, whatever it is."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support import parse

import rewriter
from rewriter.errors import ModelError, QuantizationError, RewriterError, RuleSetError, TargetError, UsageError

W = np.random.default_rng(0).standard_normal((32, 8), dtype=np.float32)
ONES = np.ones(32, np.float32)


def linear(name="w", weight=W):
    found = parse("g (float[T,32] x, float[32,8] w) => (float[T,8] y) { y = MatMul (x, w) }")
    value = found.graph.inputs.pop()
    value.name = name
    value.const_value = ir.tensor(weight, name=name)
    found.graph.register_initializer(value)
    return found


WRONG = [
    ({"rules": None}, RuleSetError, "not NoneType"),
    ({"rules": 3}, RuleSetError, "not int"),
    ({"rules": [None]}, RuleSetError, "not NoneType"),
    ({"rules": "x" * 4000}, RuleSetError, "unknown rule set"),
    ({"target": 3}, TargetError, "not int"),
    ({"target": ""}, TargetError, "target '' is not PROVIDER"),
    ({"overrides": "quantization.default.bits=8"}, RuleSetError, "by dotted key"),
    ({"overrides": {1: 2}}, RuleSetError, "by dotted key"),
    ({"imatrix": 3}, UsageError, "not int"),
    ({"imatrix": {3: ONES}}, UsageError, "by weight name"),
    ({"imatrix": {"w": [1.0] * 32}}, UsageError, "importance of 'w' is list"),
    ({"quantizer": 3}, UsageError, "not int"),
]


@pytest.mark.parametrize(("given", "kind", "words"), WRONG)
def test_wrong_arguments(given, kind, words):
    with pytest.raises(kind) as caught:
        rewriter.apply(linear(), **given)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("model", [None, [], 3, b"x", {}])
def test_no_model(model):
    with pytest.raises(UsageError, match=type(model).__name__):
        rewriter.apply(model)


def test_a_path_that_no_file_can_have():
    with pytest.raises(ModelError, match="File name too long"):
        rewriter.apply("x" * 5000)


@pytest.mark.parametrize("made", [None, rewriter.QuantizedWeight([[1]], [[1]], None, 4, 32)])
def test_a_quantizer_that_returns_something_else(made):
    def gptq(weight, context):
        return made

    with pytest.raises(QuantizationError, match="the quantizer 'gptq' broke its promise for weight 'w'"):
        rewriter.apply(linear(), quantizer=gptq)


def test_a_quantizer_that_fails():
    def gptq(weight, context):
        raise KeyError("boom")

    message = "the quantizer 'gptq' failed on weight 'w': KeyError: 'boom'"
    with pytest.raises(QuantizationError, match=message) as caught:
        rewriter.apply(linear(), quantizer=gptq)
    assert isinstance(caught.value.__cause__, KeyError)


def test_all_of_the_nearest_names_are_given():
    with pytest.raises(RuleSetError, match="did you mean 'moe-int3' or 'moe-int4' or 'moe-int8'"):
        rewriter.apply(linear(), "moe-int5")


def test_feeds_that_are_none():
    with pytest.raises(UsageError, match="not int"):
        rewriter.apply(linear()).check(3)


def test_an_error_is_one_line_whatever_a_model_names(tmp_path):
    broken = W.copy()
    broken[0] = np.nan
    with pytest.raises(QuantizationError) as caught:
        rewriter.apply(linear("a\n\x1b[31mb", broken), overrides={"parity.local": "none"}).save(tmp_path / "out")
    assert r"'a \x1b[31mb'" in str(caught.value)
    assert str(RewriterError("a\n\tb\x00")) == r"a b\x00"
