"""Facts: stated forward, dropped where a commit touched, and the same afterwards as if stated anew."""

from __future__ import annotations

import contextvars

import onnx_ir as ir
import pytest
from hypothesis import given
from onnxscript.rewriter import RewriteRuleClassBase
from support import Drop, parse

import rewriter
from rewriter.engine.context import ModelRun
from rewriter.engine.driver import Engine
from rewriter.engine.proposal import Change
from rewriter.errors import RuleError
from rewriter.facts import Facts, Family
from rewriter.facts.constants import constants
from rewriter.quantize import ALGORITHMS
from rewriter.rule import Declined, Rule
from rewriter.ruleset import load
from rewriter.target import Target
from rewriter.tensors import View
from rewriter.testing import unrolled_experts

RECOGNISERS = tuple(constants)
STACK = "<float[3,2,2] W = {0,1,2,3,4,5,6,7,8,9,10,11}, int64 zero = {0}, int64[1] one = {1}>"


def stated(model, recognisers=RECOGNISERS):
    facts = Facts(model, recognisers)
    facts.compute()
    return facts


def values(model):
    for body in (model.graph, *model.functions.values()):
        for node in body.all_nodes():
            yield from node.outputs


def shown(facts, model):
    return {value.name: facts.get(value, View) for value in values(model)}


def told(facts, model):
    """What each value shows; Constant nodes give a tensor of their own each time, so by contents."""
    found = shown(facts, model)
    return {name: view and (view.shape, view.dtype, view.numpy().tobytes()) for name, view in found.items()}


@given(unrolled_experts(max_size=6))
def test_facts_after_a_run_are_those_of_the_result(model):
    model = model.clone()
    rule_set = load(["unstack"])
    run = ModelRun(model, rule_set.plan, Target.parse("auto"), ALGORITHMS)
    Engine(run, lambda rewrite, run: None).apply(rule_set)
    assert told(run.facts, model) == told(stated(model), model)


def test_a_value_of_a_nested_graph_has_facts_of_what_it_captures():
    model = parse(f"""
        g (float[2,2] x, bool c) => (float[2,2] y) {STACK} {{
           outer = Gather (W, zero)
           y = If (c) <then_branch = t () => (float[2,2] u) {{
                          inner = Transpose (outer)
                          u = If (c) <then_branch = t () => (float[2,2] v) {{
                                         w = Transpose (inner) v = MatMul (x, w) }},
                                      else_branch = e () => (float[2,2] v) {{ v = MatMul (x, inner) }}> }},
                       else_branch = e () => (float[2,2] u) {{ u = MatMul (x, outer) }}>
        }}""")
    facts = stated(model)
    found = {name: view.label for name, view in shown(facts, model).items() if view is not None}
    assert found == {"outer": "W__slice_0", "inner": "W__slice_0__T", "w": "W__slice_0"}


def test_facts_of_functions():
    model = parse(
        "g (float[2,2] x) => (float[2,2] y) { y = local.F (x) }",
        functions="""<domain: "local", opset_import: ["" : 21]>
        F (x) => (y) { W = Constant <value = float[2,2,2] {1,2,3,4,5,6,7,8}> () zero = Constant <value_int = 1> ()
                       w = Gather (W, zero) y = MatMul (x, w) }""",
        domains=', "local" : 1',
    )
    (view,) = {view for name, view in shown(stated(model), model).items() if name == "w"}
    assert view.label == "W__slice_1"


def test_what_a_function_is_told_by_its_caller_is_no_constant():
    model = parse(
        "g (float[2,2] x) => (float[2,2] y) { y = local.F <axis = 1> (x) }",
        functions="""<domain: "local", opset_import: ["" : 21]>
        F <axis> (x) => (y) { W = Constant <value = float[2,2,2] {1,2,3,4,5,6,7,8}> () one = Constant <value_int = 1> ()
                              w = Gather <axis: int = @axis> (W, one) y = MatMul (x, w) }""",
        domains=', "local" : 1',
    )
    assert shown(stated(model), model)["w"] is None
    assert rewriter.apply(model, "moe-int4").report.applied == {}


def at_relu(function):
    """The recognisers of a family that has this one."""
    family = Family("relus")
    family.at("Relu")(function)
    return tuple(family)


def guess(facts, node, x):
    return 1 // 0


def near(facts, node, x):
    raise Declined("almost")


def test_a_recogniser_at_fault_is_named():
    with pytest.raises(RuleError, match=r"relus.guess.* at node r: ZeroDivisionError"):
        stated(parse("g (float[2] x) => (float[2] y) { [r] y = Relu (x) }"), at_relu(guess))


def test_why_nothing_was_stated_is_kept():
    model = parse("g (float[2] x) => (float[2] y) { y = Relu (x) }")
    facts = stated(model, at_relu(near))
    assert facts.why_not(model.graph.outputs[0]) == "almost"
    assert facts.why_not(None) == facts.why_not(model.graph.inputs[0]) == ""


def test_a_derived_fact_is_found_anew_when_its_graph_changed():
    """Whether a stack is read whole changes when its reader goes."""

    class DropReader(RewriteRuleClassBase):
        """Add(y, Mul(ReduceMax(stack), 0)) -> y: written for this test alone."""

        def pattern(self, op, y, stack):
            return op.Add(y, op.ReduceMax(stack))

        def rewrite(self, op, y, stack):
            return op.Identity(y)

    model = parse(f"""
        g (float[2,2] x) => (float[2,2] z) {STACK} {{
           w = Gather (W, zero)
           y = MatMul (x, w)
           m = ReduceMax (W)
           z = Add (y, m)
        }}""")
    result = rewriter.apply(model, ["unstack", DropReader()], overrides={"parity.local": "none"})
    assert result.report.applied == {"drop-reader": 1, "unstack": 1}
    assert set(result.model.graph.initializers) >= {"W__slice_0"} and "W" not in result.model.graph.initializers


def test_facts_are_kept_from_phase_to_phase():
    """And what a commit in between touched is stated anew, that alone."""
    asked = []

    def noted(facts, node, x):
        asked.append(node.name)
        return "positive"

    def phases():
        first, second = at_relu(noted), ()
        run.recognise(first)
        run.recognise(first)
        run.recognise(second)
        model.graph.append(node := ir.node("Relu", [model.graph.inputs[0]], name="t"))
        run.follow(node, Change([], [node], []), {})
        model.graph.append(node := ir.node("Abs", [node.outputs[0]]))
        run.follow(node, Change([], [node], []), {})
        run.recognise(first)

    model = parse("g (float[2] x) => (float[2] y) { [r] u = Relu (x) [s] y = Relu (u) }")
    run = ModelRun(model, load(["unstack"]).plan, Target.parse("auto"), ALGORITHMS)
    contextvars.Context().run(phases)  # as users run it: without the checks of tests, which ask anew
    assert asked == ["r", "s", "t"]


def test_what_commits_touched_is_stated_when_somebody_asks():
    """All of it at once, and of what has left the model by then nothing."""
    asked = []

    def noted(facts, node, x):
        asked.append(node.name)
        return "positive"

    def commits():
        run.recognise(at_relu(noted))
        for name in ("s", "t"):
            model.graph.append(node := ir.node("Relu", [model.graph.inputs[0]], name=name))
            run.follow(node, Change([], [node], []), {})
        model.graph.remove(node, safe=True)
        run.follow(node, Change([node], [], []), {})
        assert asked == ["r"]
        assert run.facts.get(model.graph[-1].outputs[0], str) == "positive"
        assert run.facts.get(node.outputs[0], str) is None

    model = parse("g (float[2] x) => (float[2] y) { [r] y = Relu (x) }")
    run = ModelRun(model, load(["unstack"]).plan, Target.parse("auto"), ALGORITHMS)
    contextvars.Context().run(commits)
    assert asked == ["r", "s"]


def test_what_reads_a_value_beside_a_node_that_was_rewired_is_not_stated_anew():
    """Else a value that many read is gone through by each commit that lets one more node read it."""
    asked = []

    def noted(facts, node, x):
        asked.append(node.name)
        return "positive"

    class Asks(Rule):
        recognisers = at_relu(noted)

        def pattern(self, op, x):
            return op.Relu(x)

        def may_begin(self, node):
            return self.run.facts.get(node.outputs[0], str) is None

        def rewrite(self, op, x):
            return None

    count = 20
    pairs = " ".join(f"i{n} = Identity (x) r{n} = Relu (i{n})" for n in range(count))
    model = parse(f"g (float[2] x) => (float[2] y) {{ {pairs} y = Sum ({', '.join(f'r{n}' for n in range(count))}) }}")
    rules, no_proof = [Drop(), Asks(name="asks")], {"parity.local": "none"}
    result = contextvars.Context().run(rewriter.apply, model, rules, overrides=no_proof)
    assert result.report.applied == {"drop-identity": count} and len(asked) == 2 * count


def test_a_recogniser_that_looks_further_than_its_inputs_is_found():
    def readers(facts, node, x):
        return len(x.uses())

    model = parse("g (float[2] x) => (float[2] y) { u = Relu (x) y = Abs (u) }")
    run = ModelRun(model, load(["unstack"]).plan, Target.parse("auto"), ALGORITHMS)
    recognisers = at_relu(readers)
    run.recognise(recognisers)
    model.graph.append(node := ir.node("Neg", [model.graph.inputs[0]]))
    run.follow(node, Change([], [node], []), {})
    with pytest.raises(RuleError, match=r"of 'u' was kept \[1.*anew.*\[2"):
        run.recognise(recognisers)


def test_a_rule_sees_facts_through_what_others_dropped():
    class Once(Rule):
        recognisers = RECOGNISERS

        def pattern(self, op, x, w):
            return op.MatMul(x, w, _outputs=["y"])

        def rewrite(self, op, x, w, y):
            view = self.run.facts.get(w, View)
            raise Declined(view.label if view is not None else "no view", w)

    model = parse(f"""
        g (float[2,2] x) => (float[2,2] z) {STACK} {{
           v = Gather (W, zero)
           i = Abs (v)
           w = Transpose (i)
           z = MatMul (x, w)
        }}""")
    seen = [d.reason for d in rewriter.apply(model, [Once(name="once")]).report.declines]
    after = rewriter.apply(model, [Drop("Abs"), Once(name="once")], overrides={"parity.local": "none"}).report
    assert seen == ["no view"] and [d.reason for d in after.declines] == ["W__slice_0__T"]
