"""check_rule catches what it promises to catch: a deliberately wrong rule for each promise."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.errors import DeadlineExceeded
from onnxscript.rewriter import RewriteRuleClassBase
from support import Swap

from rewriter.api import apply
from rewriter.emit import matmul_nbits
from rewriter.rule import Declined, NotApplicable, Rule
from rewriter.rules import unstack
from rewriter.rules.unstack import Unstack, read
from rewriter.tensors import View, ViewTensor
from rewriter.testing import check_model, check_rule, describe, near_misses, projections, unrolled_experts
from rewriter.testing.promises import agreement

FEW = settings(max_examples=60, derandomize=True, database=None)
PLAIN = {"placements": ["main"], "names": ["named"], "obstacles": [], "max_size": 2, "typed": True}
MODEL = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[2,3] x) => (float[2,3] y) <float[2,3] a> { [relu] a = Relu (x) y = Neg (a) }
"""


class WrongView(Unstack):
    """unstack, with another view than the right one."""

    def __init__(self, wrong, operator):
        super().__init__("unstack", *operator, remove_nodes=False)
        self._wrong = wrong

    def replace(self, op, node) -> Mapping[ir.Value, ir.Value]:
        found = read(self.run.facts, node).items()
        return {value: op.initializer(ViewTensor(self._wrong(view))) for value, view in found}


def off_by_one(view):
    size = int(np.prod(view.source.shape.numpy()[1:]))
    stacked = int(np.prod(view.source.shape.numpy()))
    return dataclasses.replace(view, offset=(view.offset + size) % stacked) if view.expert is not None else view


def transposed(view):
    return dataclasses.replace(view.T, shape=view.shape) if view.rank == 2 and len(set(view.shape)) == 1 else view


@pytest.mark.parametrize("wrong", [off_by_one, transposed])
def test_a_wrong_view_fails_its_parity(wrong):
    with pytest.raises(AssertionError, match="it failed its parity: rule unstack at node") as caught:
        rules = [WrongView(wrong, rule._operator) for rule in unstack.rule()]
        check_rule(rules, unrolled_experts(**PLAIN), settings=FEW)
    assert "moe (float[T," in str(caught.value), "the smallest model is printed as ONNX text"


class Relu(RewriteRuleClassBase):
    """Relu(x) -> whatever the test says."""

    def __init__(self, make, name="relu"):
        super().__init__(name=name)
        self._make = make

    def pattern(self, op, x):
        return op.Relu(x, _outputs=["y"])

    def rewrite(self, op, x, y):
        return self._make(op, x, y)


_numbers = itertools.count()


def _fails(op, x, y):
    raise ZeroDivisionError("by zero")


def _drops_a_name(op, x, y):
    y.graph.metadata_props["left"] = "behind"
    return op.Max(x, op.initializer(ir.tensor(np.float32(0), name="zero")))


def _says_nothing(op, x, y):
    raise Declined("", y)


WRONG = {
    "it raised RuleError: rule relu at node relu: ZeroDivisionError": _fails,
    "it raised RuleError: rule relu at node relu: TypeError: rewrite returned a str": lambda op, x, y: "y",
    "it raised RuleError: rule relu at node relu: TypeError: rewrite returned a Node": lambda op, x, y: y.producer(),
    "it raised RuleError: rule relu at node relu: ValueError: Declined needs a reason": _says_nothing,
    "it failed its parity": lambda op, x, y: op.Abs(x),
    "a second run gives another model": lambda op, x, y: op.Max(
        x, op.initializer(ir.tensor(np.float32(0), name=f"zero_{next(_numbers)}"))
    ),
    "it raised NonConvergenceError": lambda op, x, y: op.Relu(x),
    "it raised RuleError: rule relu at node relu: it changed the model while it was matched": _drops_a_name,
}


@pytest.mark.parametrize("message", WRONG)
def test_every_broken_promise_is_named(message):
    with pytest.raises(AssertionError) as caught:
        check_model(Relu(WRONG[message]), MODEL)
    assert str(caught.value).startswith(f"relu: {message}")
    assert "[relu] a = Relu (x)" in str(caught.value)


class Doubled(Rule):
    """MatMul(x, w) -> MatMul(x / 2, 2w), the weight computed at once."""

    def __init__(self, guarded):
        super().__init__(name="doubled")
        self._guarded = guarded

    def pattern(self, op, x, w):
        return op.MatMul(x, w, _outputs=["y"])

    def rewrite(self, op, x, w, y):
        if w.const_value is None or "doubled" in w.name:
            raise NotApplicable
        if self._guarded and len(w.uses()) > 1:
            raise Declined("the weight would stay in the model", w)
        weight = op.initializer(ir.tensor(w.const_value.numpy() * 2, name=f"{w.name}_doubled"))
        return op.MatMul(op.Div(x, op.initializer(ir.tensor(np.float32(2), name="two"))), weight)


def matmul(others=""):
    weight = ir.tensor(np.linspace(-1, 1, 1024, dtype=np.float32).reshape(32, 32), name="w")
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[32, 32] x, float[32, 32] w) => (float[32, 32] y)'
        f" {{ a = MatMul (x, w) {others or 'b = Relu (x)'} y = Add (a, b) }}"
    )
    value = model.graph.inputs.pop()
    value.const_value = weight
    model.graph.register_initializer(value)
    return model


def test_a_computed_weight_replaces_the_old_one():
    left = "initializer 'w' lost a reader and is left in the model, beside 4100 bytes of new constants"
    assert check_model(Doubled(False), matmul()).applied == {"doubled": 1}
    with pytest.raises(AssertionError, match=f"doubled: {left}"):
        check_model(Doubled(False), matmul("b = Relu (w)"))
    assert check_model(Doubled(True), matmul("b = Relu (w)")).declines


def test_another_rule_may_quantize_for_the_other_reader():
    assert check_model("matmul-to-matmul-nbits", matmul("b = Gemm (x, w)")).applied == {"matmul-to-matmul-nbits": 1}
    assert not check_model("matmul-to-matmul-nbits", matmul("b = Relu (w)")).applied


class Misread(Rule):
    """matmul-to-matmul-nbits of another weight than the one that it matches."""

    def pattern(self, op, x, w):
        return op.MatMul(x, w, _outputs=["y"])

    def rewrite(self, op, x, w, y):
        if w.const_value is None:
            raise NotApplicable
        other = View.whole(ir.tensor(np.zeros((32, 32), np.float32)), "other")
        dtype = np.dtype(np.float32)
        job = self.run.quantize(other, y.producer(), self.name, dtype)
        return matmul_nbits(self.run, op, x, job)


def test_a_weight_that_was_not_matched_is_no_reason_to_end_the_run():
    reason = "weight 'other' is not among the constants of what its rule matched"
    (decline,) = apply(matmul(), [Misread(name="misread")]).report.declines
    assert (decline.rule, decline.reason) == ("misread", reason)
    with pytest.raises(AssertionError, match=rf"^misread: rule misread at .* quantizes what it did not .*: {reason}"):
        check_model(Misread(name="misread"), matmul())


def test_the_given_model_may_not_change():
    model = ir.from_onnx_text(MODEL)

    def edits(op, x, y):
        model.graph.doc_string = "edited"
        return op.Max(x, op.initializer(ir.tensor(np.float32(0), name="zero")))

    with pytest.raises(AssertionError, match="the given model has changed"):
        check_model(Relu(edits), model)


def test_a_rule_must_not_fire_on_its_own_result():
    class Again(Rule):
        """Neg(x) -> Neg(x) once for each run: no sweep sees it, a second run does."""

        def pattern(self, op, x):
            return op.Neg(x, _outputs=["y"])

        def rewrite(self, op, x, y):
            if self.run.__dict__.setdefault("done", False):
                raise Declined("once is enough", y)
            self.run.__dict__["done"] = True
            return op.Neg(x)

    with pytest.raises(AssertionError, match=r"on its own result it fires again: .'again': 1"):
        check_model(Again(name="again"), MODEL)


def test_a_rule_that_never_fires_is_not_shown_to_be_right():
    with pytest.raises(AssertionError, match="fired on none of the drawn models"):
        check_rule(Swap("Tanh", "Tanh"), projections(max_size=2), settings=settings(FEW, max_examples=5))


def test_a_rule_that_never_fires_says_why():
    def declines(op, x, y):
        raise Declined("it is never right", y)

    models = st.builds(lambda: ir.from_onnx_text(MODEL))
    with pytest.raises(AssertionError, match=r"fired on none .*; it declined: it is never right \(\d+ models\); where"):
        check_rule(Relu(declines), models, settings=FEW)
    with pytest.raises(AssertionError, match=r"nothing was shown of it; where it did not decline, .* returned None"):
        check_rule(Relu(lambda op, x, y: None), models, settings=FEW)


def test_a_rule_that_fires_on_few_models_is_given_more():
    drawn = itertools.count()

    def seldom(op, x, y):
        if next(drawn) < 20:
            raise Declined("not yet", y)
        return op.Max(x, op.initializer(ir.tensor(np.float32(0), name="zero")))

    few = settings(max_examples=5, database=None)
    check_rule(Relu(seldom), st.integers(0, 999).map(lambda _: ir.from_onnx_text(MODEL)), settings=few)


def test_the_cause_of_a_rule_error_is_the_rules_own():
    with pytest.raises(AssertionError) as caught:
        check_model(Relu(_fails), MODEL)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("print_blob", [False, True])  # Hypothesis' default is True where the variable CI is set
def test_hypothesis_adds_nothing_to_the_message(print_blob):
    few = settings(FEW, print_blob=print_blob)
    with pytest.raises(AssertionError) as caught:
        check_rule(Relu(lambda op, x, y: op.Abs(x)), st.builds(lambda: ir.from_onnx_text(MODEL)), settings=few)
    assert not getattr(caught.value, "__notes__", [])


def test_a_right_rule_passes_and_its_report_is_returned():
    right = Relu(lambda op, x, y: op.Max(x, op.initializer(ir.tensor(np.float32(0), name="zero"))))
    assert check_model(right, MODEL).applied == {"relu": 1}


def test_what_is_printed_can_be_pasted():
    drawn = []
    check_rule("unstack", unrolled_experts(**PLAIN).map(lambda m: (drawn.append(m), m)[1]), settings=FEW)
    for model in drawn[:10]:
        text = describe(model)
        check_model("unstack", text)


def test_a_constant_is_printed_once():
    text = describe(ir.from_onnx_text(MODEL.replace("<float[2,3] a>", "<float[1] c = {2}, float[2,3] a>")))
    assert "<float[1] c =  {2}, float[2,3] a>" in text


def test_what_pytest_prints_can_be_pasted():
    printed = "\n".join(f"E       {line}".rstrip() for line in describe(ir.from_onnx_text(MODEL)).splitlines())
    right = Relu(lambda op, x, y: op.Max(x, op.initializer(ir.tensor(np.float32(0), name="zero"))))
    assert check_model(right, f"\n{printed}\nE       \nE\n").applied == {"relu": 1}


@pytest.mark.parametrize("holds", [check_rule, near_misses])
@pytest.mark.parametrize("own", [None, 100])
def test_a_slow_test_is_no_failure_unless_a_deadline_is_set(holds, own):
    """Without the plugin a deadline of 200 ms holds, and a run of a model may take longer."""
    fresh = settings.get_profile("default")
    given = {} if own is None else {"deadline": own}

    def slow(op, x, y):
        time.sleep(0.25)
        return op.Max(x, op.initializer(ir.tensor(np.float32(0), name="zero")))

    models = st.builds(lambda: ir.from_onnx_text(MODEL))
    few = settings(fresh, max_examples=2, database=None, **given)
    with pytest.raises(DeadlineExceeded) if own else contextlib.nullcontext():
        holds(Relu(slow), models, settings=few)


@pytest.mark.parametrize(
    ("read", "shape"), [("c = Cast<to=1>(w)", (40, 24)), ("g = Gather(w, i) c = Cast<to=1>(g)", (3, 40, 24))]
)
def test_a_widened_weight_is_compared_as_wide_as_it_is_read(read, shape, monkeypatch):
    """Its dequantized values are none of float16: the model with those would compute something else."""
    compared = []
    compare = agreement._compare
    monkeypatch.setattr(agreement, "_compare", lambda *a, **k: (compared.append(a[0]), compare(*a, **k)))
    text = f"agraph (float[t, 40] x) => (float[t, 24] y) {{ {read} y = MatMul(x, c) }}"
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}')
    weights = {"w": np.random.default_rng(0).standard_normal(shape).astype(np.float16), "i": np.array(1)}
    held = weights if "Gather" in read else {"w": weights["w"]}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in held.items())
    given = ir.from_proto(onnx.shape_inference.infer_shapes(model))
    assert check_model(["unstack", "matmul-to-matmul-nbits"], given).applied["matmul-to-matmul-nbits"] == 1
    assert compared == ["y", "y"]
