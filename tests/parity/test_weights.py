"""The weights of a proof: large ones are fed as they lie in memory, and what is proved is the same."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
from onnxscript.rewriter import RewriteRuleClassBase

import rewriter
from rewriter.parity.local import LocalProver
from rewriter.parity.runtime import OrtRuntime
from rewriter.parity.weights import fed_weights
from rewriter.ruleset import ParitySettings

MODELS = Path(__file__).parent.parent / "models"
LARGE = "rewriter.parity.weights._LARGE"


class Recorder:
    """ONNX Runtime, and for each model that it ran the shapes of the initializers, and the feeds."""

    name = "cpu"

    def __init__(self):
        self.stored = []
        self.fed = []

    def run(self, model, feeds):
        self.stored.append({tuple(tensor.dims) for tensor in model.graph.initializer})
        self.fed.append({array.shape: array for array in feeds.values()})
        return OrtRuntime().run(model, feeds)


class MatMulToGemm(RewriteRuleClassBase):
    def pattern(self, op, x, w):
        return op.MatMul(x, w)

    def rewrite(self, op, x, w):
        return op.Gemm(x, w)


def linear(weight):
    k, n = weight.shape
    header = '<ir_version: 10, opset_import: ["" : 21]>'
    graph = f"g (float[T,{k}] x) => (float[T,{n}] y) <float[{k},{n}] w> {{ y = MatMul(x, w) }}"
    return ir.from_onnx_text(f"{header}\n{graph}", initializers=[ir.tensor(weight, name="w")])


def proved(model, rules):
    seen = Recorder()
    rewriter.apply(model, rules, prover=LocalProver(ParitySettings("all"), seen))
    return seen


def random(*shape):
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def test_a_large_weight_is_fed_and_not_copied():
    weight = random(512, 1024)
    seen = proved(linear(weight), [MatMulToGemm()])
    assert seen.stored == [set(), set()]
    assert all(np.shares_memory(fed[weight.shape], weight) for fed in seen.fed)


def test_a_small_weight_is_an_initializer():
    seen = proved(linear(random(32, 64)), [MatMulToGemm()])
    assert seen.stored[:2] == [{(32, 64)}, {(32, 64)}]


def test_what_a_quantized_operator_reads_is_an_initializer_however_large(monkeypatch):
    monkeypatch.setattr(LARGE, 1)
    seen = proved(linear(random(64, 32)), ["matmul-to-matmul-nbits"])
    before, after = seen.fed[:2]
    assert (64, 32) in before and (64, 32) not in seen.stored[0]
    assert len(after) == 1 and len(seen.stored[1]) == 2  # x; codes and scales


def test_what_a_quantized_operator_reads_by_way_of_others_is_an_initializer(monkeypatch):
    monkeypatch.setattr(LARGE, 1)
    scales, shape, x, w, b = (ir.val(name) for name in ("scales", "shape", "x", "w", "b"))
    moved = ir.node("Reshape", [scales, shape])
    multiplied = ir.node("MatMul", [x, w])
    quantized = ir.node("MatMulNBits", [multiplied.outputs[0], b, moved.outputs[0]], domain="com.microsoft")
    constants = {v: ir.tensor(random(8), name=v.name) for v in (scales, shape, w, b)}
    side = SimpleNamespace(nodes=[moved, multiplied, quantized], constants=constants)
    assert fed_weights(side) == {w}


def test_a_weight_of_many_rows_is_dequantized_whole():
    seen = proved(linear(random(64, 2100)), ["matmul-to-matmul-nbits"])
    assert seen.stored[:2] == [{(64, 2100)}, {(2100, 2), (2100, 2, 16)}]  # both sides ran, and agree


@pytest.mark.parametrize(
    "path",
    [
        "mobius/granitemoehybrid_static_unroll_f32.onnx",
        "torch_unroll/getitem_matmul_T__dynamo18_opt_f16.onnx",
        "hf_exporter/gpt_oss__default.onnx",
    ],
)
def test_fed_or_stored_a_proof_says_the_same(path, monkeypatch):
    said = []
    for least in (1, 1 << 40):
        monkeypatch.setattr(LARGE, least)
        report = rewriter.apply(MODELS / path, overrides={"parity.local": "all"}).report
        assert all(proof.max_relative <= proof.tolerance for proof in report.proofs)
        said.append([(p.rule, p.runtime, p.tolerance, p.node, p.skipped, p.because) for p in report.proofs])
    assert said[0] == said[1]


def experts_that_go_up_and_down_by_one_matrix(weight=None):
    steps = """
        scores = Softmax(logits)  weights, chosen = TopK(scores, two)"""
    for e in range(2):
        steps += f"""
        w{e} = Gather(w, number{e})  t{e} = Transpose(w{e})
        up{e} = MatMul(x, t{e})  act{e} = Relu(up{e})  down{e} = MatMul(act{e}, w{e})
        is{e} = Equal(chosen, number{e})  mask{e} = Cast<to = 1>(is{e})
        slots{e} = Mul(weights, mask{e})  share{e} = ReduceSum(slots{e}, last)  part{e} = Mul(down{e}, share{e})"""
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
    tied (float[T,32] x, float[T,2] logits) => (float[T,32] y) <
        float[2,64,32] w, int64 number0 = {{0}}, int64 number1 = {{1}}, int64[1] two = {{2}}, int64[1] last = {{-1}}
    > {{{steps}
        y = Add(part0, part1)
    }}"""
    return ir.from_onnx_text(text, initializers=[ir.tensor(random(2, 64, 32) if weight is None else weight, name="w")])


@pytest.mark.parametrize(
    ("number", "every", "reason"),
    [
        (np.nan, False, "holds NaN or infinity, with which nothing can be proved"),
        (np.inf, False, "holds NaN or infinity, with which nothing can be proved"),
        (-np.inf, True, "holds NaN or infinity, with which nothing can be proved"),
        (3e38, False, "holds 3e+38, with which what it is part of overflows by itself"),
        (1e38, True, "holds 1e+38, with which what it is part of overflows by itself"),
    ],
)
def test_weights_with_which_nothing_can_be_proved_are_named_and_no_rule_is_blamed(number, every, reason):
    weight = random(2, 64, 32)
    weight[1, ...] = np.sign(weight[1]) * number if every else weight[1]
    weight[1, 3, 5] = number
    report = rewriter.apply(experts_that_go_up_and_down_by_one_matrix(weight), ["fuse-experts"]).report
    ((_, said),) = report.declined
    assert reason in said and not any(decline.failed for decline in report.declines)


def test_large_weights_that_overflow_nowhere_are_proved():
    weight = random(2, 64, 32) * np.float32(1e12)
    report = rewriter.apply(experts_that_go_up_and_down_by_one_matrix(weight), ["fuse-experts"]).report
    assert report.applied == {"fuse-experts": 1} and report.proofs[0].max_relative < 1e-5


class MaskedLess(RewriteRuleClassBase):
    """Wrong: it masks by a large number, and not by infinity."""

    def pattern(self, op, x, mask, w):
        return op.Add(op.MatMul(x, w), mask)

    def rewrite(self, op, x, mask, w):
        less = np.maximum(mask.const_value.numpy(), -3e38)
        return op.Add(op.MatMul(x, w), op.initializer(ir.tensor(less, name="less")))


def test_an_infinite_mask_is_no_weight_that_excuses_a_rule():
    mask = np.zeros((2, 4), np.float32)
    mask[1, 2] = -np.inf
    graph = "g (float[2,3] x) => (float[2,4] y) { h = MatMul(x, w) y = Add(h, mask) }"
    text = f'<ir_version: 10, opset_import: ["" : 21]> {graph}'
    model = ir.from_onnx_text(text, initializers=[ir.tensor(mask, name="mask"), ir.tensor(random(3, 4), name="w")])
    (decline,) = rewriter.apply(model, [MaskedLess.rule()]).report.declines
    assert decline.failed and "the rewrite is wrong" in decline.reason


def test_one_matrix_that_is_read_both_ways_is_dequantized_as_each_projection_reads_it():
    report = rewriter.apply(experts_that_go_up_and_down_by_one_matrix(), ["fuse-experts", "moe-to-qmoe"]).report
    assert report.applied == {"fuse-experts": 1, "moe-to-qmoe": 1}
