"""rewriter.apply: one call, three kinds of model, any form of rule set; the given model is left as it is."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support import Drop, Swap, histogram, parse, run, snapshot

import rewriter
from rewriter.errors import ModelError, ParityError, QuantizationError, RuleSetError, UsageError
from rewriter.quantize import ALGORITHMS
from rewriter.ruleset import load

W = np.random.default_rng(0).standard_normal((32, 8), dtype=np.float32)
RTN = {"quantization.default.algorithm": "rtn"}
X = np.random.default_rng(1).standard_normal((3, 32), dtype=np.float32)


@pytest.fixture
def model():
    found = parse("g (float[T,32] x, float[32,8] w) => (float[T,8] y) { i = Identity (x) y = MatMul (i, w) }")
    found.graph.inputs.pop()
    value = found.graph[1].inputs[1]
    value.const_value = ir.tensor(W, name="w")
    found.graph.register_initializer(value)
    return found


def kinds(model, tmp_path):
    path = tmp_path / "in" / "model.onnx"
    path.parent.mkdir(exist_ok=True)
    ir.save(model, path)
    return {"path": path, "str": str(path), "ir": model, "proto": ir.to_proto(model)}


@pytest.mark.parametrize("kind", ["path", "str", "ir", "proto"])
def test_the_result_is_of_the_kind_that_was_given(kind, model, tmp_path):
    given = kinds(model, tmp_path)[kind]
    before = snapshot(model), (tmp_path / "in" / "model.onnx").read_bytes()
    result = rewriter.apply(given, ["matmul-to-matmul-nbits"])
    assert isinstance(result.model, onnx.ModelProto if kind == "proto" else ir.Model)
    assert result.report.applied == {"matmul-to-matmul-nbits": 1}
    assert run(result.model, {"x": X})["y"].shape == (3, 8)
    assert before == (snapshot(model), (tmp_path / "in" / "model.onnx").read_bytes())


def test_all_kinds_give_the_same_model(model, tmp_path):
    results = [rewriter.apply(given, "moe-int4").model for given in kinds(model, tmp_path).values()]
    texts = {onnx.printer.to_text(m if isinstance(m, onnx.ModelProto) else ir.to_proto(m)) for m in results}
    assert len(texts) == 1


RULES = {
    "a name": "moe-int4",
    "rules": ["matmul-to-matmul-nbits", Drop()],
    "a mapping": {"phases": [{"name": "q", "rules": ["matmul-to-matmul-nbits"]}]},
    "a rule set": load(["matmul-to-matmul-nbits"]),
}


@pytest.mark.parametrize("form", RULES)
def test_rules_in_any_form(form, model):
    report = rewriter.apply(model, RULES[form]).report
    assert report.applied["matmul-to-matmul-nbits"] == 1


def test_a_file_of_rules(model, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("phases: [{name: q, rules: [matmul-to-matmul-nbits]}]\n")
    report = rewriter.apply(model, file).report
    assert report.rule_set == "mine" and report.applied == {"matmul-to-matmul-nbits": 1}


def test_moe_int4_is_the_default(model):
    assert rewriter.apply(model).report.rule_set == "moe-int4"


def test_overrides_win(model):
    result = rewriter.apply(model, overrides={"quantization.default.bits": 8})
    (node,) = (n for n in result.model.graph if n.op_type == "MatMulNBits")
    assert node.attributes["bits"].as_int() == 8


def test_a_quantizer_of_ones_own(model):
    seen = []

    def mine(weight, context):
        seen.append((weight.shape, weight.dtype, context.weight, context.rule, context.spec.bits))
        return ALGORITHMS["rtn"](weight, context)

    result = rewriter.apply(model, quantizer=mine, overrides=RTN)
    ir.to_proto(result.model)
    assert set(seen) == {((8, 32), np.dtype(np.float32), "w", "matmul-to-matmul-nbits", 4)}
    plain = rewriter.apply(model, overrides=RTN)
    assert ir.to_proto(plain.model).graph == ir.to_proto(result.model).graph


def test_the_report_is_complete_once_the_model_is_saved(model, tmp_path):
    result = rewriter.apply(model)
    path = result.save(tmp_path / "out")
    report = result.report
    (weight,) = report.weights
    assert (weight.name, weight.bits, weight.bytes_before) == ("w", 4, W.nbytes)
    assert 0 < weight.relative_rms < 0.2
    assert report.bytes_after < report.bytes_before
    data = report.to_json()
    assert data["schema_version"] == 2 and data["applied"] == {"matmul-to-matmul-nbits": 1}
    assert set(run(onnx.load(path), {"x": X})) == {"y"}


def test_an_existing_output_is_kept(model, tmp_path):
    result = rewriter.apply(model)
    result.save(tmp_path / "out")
    with pytest.raises(UsageError):
        result.save(tmp_path / "out")
    result.save(tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_left(value, model, tmp_path):
    broken = W.copy()
    broken[3, 3] = value
    model.graph.initializers["w"].const_value = ir.tensor(broken, name="w")
    with pytest.raises(QuantizationError, match="'w'"):
        rewriter.apply(model, overrides={"parity.local": "none"}).save(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_names_that_match_nothing_are_refused(model):
    with pytest.raises(RuleSetError, match="weight pattern 'v' matches nothing in the model"):
        rewriter.apply(model, overrides={"quantization.exclude": [{"weights": "v"}]})


def test_what_is_no_model():
    with pytest.raises(UsageError, match="not int"):
        rewriter.apply(3)
    with pytest.raises(ModelError, match="there is no file"):
        rewriter.apply(Path("nowhere.onnx"))
    with pytest.raises(RuleSetError, match="unknown rule set 'moe-int5'"):
        rewriter.apply(parse("g (float[2] x) => (float[2] y) { y = Relu (x) }"), "moe-int5")


def test_a_rule_set_without_matches_gives_the_model_back():
    model = parse("g (float[2] x) => (float[2] y) { y = Relu (x) }")
    result = rewriter.apply(model)
    assert not result.report.applications and histogram(result.model) == {"Relu": 1}
    assert snapshot(result.model) == snapshot(model)


def test_weights_that_come_quantized_are_counted_and_left_alone():
    path = Path(__file__).parent / "models" / "mobius" / "gemma4_static_unroll_ortq4.onnx"
    report = rewriter.apply(path, "experts-int4").report
    assert report.already_quantized == {"MatMulNBits": 17}


UNSORTED = '<ir_version: 10, opset_import: ["" : 21]> g (float[2] x) => (float[2] y) { y = Neg (a) a = Abs (x) }'
CYCLE = '<ir_version: 10, opset_import: ["" : 21]> g (float[2] x) => (float[2] y) { y = Neg (a) a = Abs (y) }'


def test_nodes_in_no_order():
    proto = onnx.parser.parse_model(UNSORTED)
    assert [node.op_type for node in rewriter.apply(proto, "unstack").model.graph.node] == ["Abs", "Neg"]
    model = ir.from_proto(proto)
    with pytest.raises(ModelError, match=r"no topological order; call model\.graph\.sort\(\)"):
        rewriter.apply(model, "unstack")
    model.graph.sort()
    rewriter.apply(model, "unstack")


@pytest.mark.parametrize("form", [lambda proto: proto, ir.from_proto])
def test_a_cycle_is_refused_in_one_line(form):
    with pytest.raises(ModelError, match=r"'a'|'y'") as caught:
        rewriter.apply(form(onnx.parser.parse_model(CYCLE)), "unstack")
    assert "\n" not in str(caught.value)


def test_a_result_is_shown_in_one_line(model):
    shown = repr(rewriter.apply(model, "rtn"))
    assert re.fullmatch(r"<Result: <Report of rtn for cpu@\S+: 1 applications, \d+ declines, [^\n]+>>", shown), shown


def test_a_replacement_that_the_runtime_refuses_names_its_rule(model):
    with pytest.raises(ParityError, match=r"identity-to-nosuch at node i: .*does not run: .*NoSuch.*; the rewrite is"):
        rewriter.apply(model, [Swap("Identity", "NoSuch", domain="com.microsoft")], strict=True)


def test_where_nothing_fires_functions_stay():
    body = onnx.parser.parse_model(
        """
        <ir_version: 10, opset_import: ["": 21, "local": 1]> g (float[T, 64] x) => (float[T, 64] y)
        <float[64, 64] w> { y = local.Layer (x, w) }
        <opset_import: ["": 21], domain: "local"> Layer (x, w) => (y) { y = MatMul (x, w) }
        """
    )
    body.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((64, 64), np.float32), "w"))
    result = rewriter.apply(body, "unstack")
    assert not result.report.applications
    assert [node.op_type for node in result.model.graph.node] == ["Layer"] and len(result.model.functions) == 1
