"""What halves round is no fault of a rewrite: both sides are then held to the same tolerance in float32."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support import parse

import rewriter
from rewriter.errors import ParityError
from rewriter.parity import local
from rewriter.parity.float32 import widened
from rewriter.parity.runtime import ReferenceRuntime
from rewriter.rule import Rule

ROUNDS = """g (float16[8] x) => (float16[8] y) <float16 large = {25600}, float16 c = {16896}> {
  [sum] a = Add (x, large)  b = Sub (a, large)  [scale] y = Mul (b, c)
}"""  # 1024 and 3, as bits: what is below half an ulp of 1024 is lost on the way


class Shorter(Rule):
    """(x + large - large) * c -> x * c, or times another number."""

    def __init__(self, factor=3.0):
        super().__init__(name="shorter")
        self._factor = factor

    def pattern(self, op, x, large, c):
        return op.Mul(op.Sub(op.Add(x, large), large), c)

    def rewrite(self, op, *, x, large, c):
        return op.Mul(x, op.initializer(ir.tensor(np.float16(self._factor), name="factor")))


@pytest.fixture
def rounding(monkeypatch):
    """ONNX Runtime's CPU provider may compute a chain of halves in float32; the reference rounds at each operator."""
    monkeypatch.setattr(local, "default_runtime", lambda timeout, **_: ReferenceRuntime(timeout))


@pytest.mark.usefixtures("rounding")
def test_a_right_rewrite_that_rounds_less_is_proved_in_float32():
    (proof,) = rewriter.apply(parse(ROUNDS), [Shorter()]).report.proofs
    assert proof.because == "float16 rounds more than 0.001 on the way: held to it in float32"
    assert proof.max_relative < 1e-3 == proof.tolerance


@pytest.mark.usefixtures("rounding")
@pytest.mark.parametrize("factor", [-3.0, 3.01])
def test_a_wrong_one_still_fails(factor):
    with pytest.raises(
        ParityError, match=r"rule shorter at node scale: 'y' differs by .* more than 0\.001 \(reference\)"
    ):
        rewriter.apply(parse(ROUNDS), [Shorter(factor)], strict=True)


class Overflows(Shorter):
    """(x + large - large) * c -> x * 49152 * (c / 49152): exact in float32, infinite in halves."""

    def rewrite(self, op, *, x, large, c):
        numbers = [ir.tensor(np.float16(n), name=f"n{n}") for n in (49152, 3 / 49152)]
        return op.Mul(op.Mul(x, op.initializer(numbers[0])), op.initializer(numbers[1]))


@pytest.mark.usefixtures("rounding")
def test_what_the_replacement_itself_loses_in_halves_is_its_fault():
    with pytest.raises(ParityError, match="'y' differs by inf of its largest value"):
        rewriter.apply(parse(ROUNDS), [Overflows()], strict=True)


@pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16])
def test_every_half_becomes_float32(half):
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(half))
    value, flag = onnx.helper.make_tensor_value_info, onnx.TensorProto.BOOL
    constant = onnx.numpy_helper.from_array(np.array([2], half), "two")
    inner = onnx.helper.make_graph(
        [onnx.helper.make_node("Mul", ["x", "w"], ["z"])], "inner", [], [value("z", kind, [3])]
    )
    nodes = [
        onnx.helper.make_node("If", ["flag"], ["y0"], then_branch=inner, else_branch=inner),
        onnx.helper.make_node("Constant", [], ["two"], value=constant),
        onnx.helper.make_node("Cast", ["two"], ["cast"], to=kind),
        onnx.helper.make_node("Mul", ["y0", "cast"], ["y"]),
    ]
    weight = onnx.numpy_helper.from_array(np.array([1, 2, 3], half), "w")
    inputs = [value("x", kind, [3]), value("flag", flag, [])]
    graph = onnx.helper.make_graph(nodes, "g", inputs, [value("y", kind, [3])], [weight])
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 21)])
    before = model.SerializeToString()
    wide, (feeds,) = widened(model, [{"x": np.ones(3, half), "flag": np.array(True)}])
    onnx.checker.check_model(wide, full_check=True)
    result = ReferenceRuntime().run(wide, feeds)["y"]
    assert result.dtype == np.float32 and result.tolist() == [2, 4, 6]
    assert model.SerializeToString() == before and feeds["flag"].dtype == np.bool_
