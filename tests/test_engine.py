"""The engine: to the fixpoint, in every body, or with the model as it was."""

from __future__ import annotations

import gc

import numpy as np
import onnx_ir as ir
import pytest
from onnxscript.rewriter import RewriteRuleClassBase, pattern
from support import Drop, Swap, histogram, parse, run, snapshot

import rewriter
from rewriter.engine import driver
from rewriter.engine.driver import without_cycle_collection
from rewriter.errors import NonConvergenceError, ParityError, RuleError
from rewriter.memory import set_aside
from rewriter.rule import Declined, NotApplicable, Rule

NO_PROOF = {"parity.local": "none"}
CHAIN = """
g (float[2,3] x) => (float[2,3] y) {
   [first] a = Identity (x)
   [middle] b = Relu (a)
   [last] y = Identity (b)
}
"""
X = np.linspace(-2, 2, 6, dtype=np.float32).reshape(2, 3)


class RemoveDouble(RewriteRuleClassBase):
    """Relu(Relu(x)) -> Relu(x)."""

    def pattern(self, op, x):
        return op.Relu(op.Relu(x))

    def rewrite(self, op, x):
        return op.Relu(x)


class Raises(RewriteRuleClassBase):
    def pattern(self, op, x):
        return op.Relu(x)

    def rewrite(self, op, x):
        raise KeyError("what it looked for")


class Returns(RewriteRuleClassBase):
    """Relu(x) -> whatever the test says."""

    def __init__(self, make):
        super().__init__(name="returns")
        self._make = make

    def pattern(self, op, x):
        return op.Relu(x, _outputs=["y"])

    def rewrite(self, op, x, y):
        return self._make(op, x, y)


def test_a_phase_ends_where_nothing_fires_any_more():
    relus = "".join(f"v{i + 1} = Relu (v{i})\n" for i in range(6))
    model = parse(f"g (float[2,3] v0) => (float[2,3] v6) {{ {relus} }}")
    result = rewriter.apply(model, [RemoveDouble()])
    assert result.report.applied == {"remove-double": 5}
    assert histogram(result.model) == {"Relu": 1}
    assert result.report.sweeps["rules"] > 1
    np.testing.assert_array_equal(run(result.model, {"v0": X})["v6"], np.maximum(X, 0))


class AtMiddle(Rule):
    """Relu(x) -> Abs(x) wherever it is asked; by its first look at a node, ``middle`` alone is one."""

    def __init__(self, begins=lambda node: node.name == "middle", rewrite=lambda op, x: op.Abs(x)):
        super().__init__(name="at-middle")
        self._begins, self._make, self.asked = begins, rewrite, []

    def may_begin(self, node):
        return self._begins(node)

    def pattern(self, op, x):
        return op.Relu(x, _outputs=["y"])

    def rewrite(self, op, x, y):
        self.asked.append(y.producer().name)
        return self._make(op, x)


RELUS = "g (float[2,3] x) => (float[2,3] y) { [first] a = Relu (x) [middle] b = Relu (a) [last] y = Relu (b) }"


def test_a_rule_is_asked_of_no_node_at_which_it_may_not_begin(monkeypatch):
    rule = AtMiddle()
    monkeypatch.setattr(driver, "is_checked", lambda: False)  # as everywhere but in tests
    result = rewriter.apply(parse(RELUS), [rule], overrides=NO_PROOF)
    assert rule.asked == ["middle"]
    assert histogram(result.model) == {"Relu": 2, "Abs": 1}


def declining(op, x):
    raise Declined("it is none", x)


@pytest.mark.parametrize(("rewrite", "did"), [(lambda op, x: op.Abs(x), "fires"), (declining, "declines: it is none")])
def test_a_rule_that_has_something_to_say_where_it_may_not_begin_is_found_by_tests(rewrite, did):
    with pytest.raises(RuleError, match=f"at-middle.*first.*may_begin says no.* {did}"):
        rewriter.apply(parse(RELUS), [AtMiddle(rewrite=rewrite)], overrides=NO_PROOF)


class Explains(AtMiddle):
    explains = True


def test_a_rule_that_explains_is_asked_where_nothing_fires_any_more():
    def at_middle(op, x, y):
        if y.producer().name != "middle":
            raise Declined("it is elsewhere", x)
        return op.Abs(x)

    why = Explains(lambda node: True, declining)
    result = rewriter.apply(parse(RELUS), [why, Returns(at_middle)], overrides=NO_PROOF)
    assert result.report.sweeps["rules"] == 2 and why.asked == ["first", "last"]
    told = [(decline.node, decline.reason) for decline in result.report.declines]
    assert told == [(node, reason) for node in ("first", "last") for reason in ("it is none", "it is elsewhere")]


def test_a_look_that_fails_is_the_rules_fault():
    with pytest.raises(RuleError, match=r"at-middle.*first.*ZeroDivisionError"):
        rewriter.apply(parse(RELUS), [AtMiddle(lambda node: 1 // 0)], overrides=NO_PROOF)


def test_rules_that_undo_one_another_are_named():
    with pytest.raises(NonConvergenceError, match=r"'rules' still fires after 20 sweeps") as caught:
        rewriter.apply(parse(CHAIN), [Swap("Relu", "Abs"), Swap("Abs", "Relu")], overrides=NO_PROOF)
    assert "relu-to-abs at" in str(caught.value) and "abs-to-relu at" in str(caught.value)


def test_a_rule_that_matches_itself_ends():
    with pytest.raises(NonConvergenceError, match="relu-to-relu at"):
        rewriter.apply(parse(CHAIN), [Swap("Relu", "Relu")])


WRONG = {
    "an exception": (Raises(), "KeyError: 'what it looked for'"),
    "a value defined nowhere": (
        Returns(lambda op, x, y: ir.val("nowhere")),
        "the replacement of 'b' is defined nowhere",
    ),
    "too many outputs": (Returns(lambda op, x, y: [op.Relu(x), op.Relu(x)]), "2 outputs where the pattern has 1"),
    "another element type": (
        Returns(lambda op, x, y: op.initializer(ir.tensor(np.zeros((2, 3), np.float16), name="z"))),
        "'b' is FLOAT, its replacement FLOAT16",
    ),
    "another opset": (Returns(lambda op, x, y: op.Relu(x, _version=7)), "it needs opset ai.onnx 7; the model has 21"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_rule_at_fault_is_named_and_the_model_is_as_it_was(fault):
    rule, message = WRONG[fault]
    model = parse(CHAIN)
    before = snapshot(model)
    with pytest.raises(RuleError) as caught:
        rewriter.apply(model, [rule], overrides=NO_PROOF)
    assert message in str(caught.value)
    assert caught.value.node == "middle" and caught.value.rule in str(caught.value)
    assert snapshot(model) == before


def test_a_wrong_rewrite_fails_its_proof_and_nothing_is_committed():
    model = parse(CHAIN)
    before = snapshot(model)
    with pytest.raises(ParityError, match=r"rule relu-to-abs at node middle: 'b' differs by"):
        rewriter.apply(model, [Swap("Relu", "Abs")], strict=True)
    assert snapshot(model) == before


def test_a_wrong_rewrite_is_left_out_and_the_rest_goes_on():
    model = parse(CHAIN)
    result = rewriter.apply(model, [Swap("Relu", "Abs"), Swap("Identity", "Cast", to=1)])
    failed = [decline for decline in result.report.declines if decline.failed]
    assert failed == list(result.report.declines) and result.report.refusals[0].failed
    assert [(decline.rule, decline.node) for decline in failed] == [("relu-to-abs", "middle")]
    assert failed[0].reason.startswith("the rewrite is wrong and was left out: 'b' differs by")
    assert result.report.applied == {"identity-to-cast": 2}


def test_every_decline_has_its_reason_and_culprit():
    def decline(op, x, y):
        raise Declined("it is not what it seems", x)

    result = rewriter.apply(parse(CHAIN), [Returns(decline)])
    (decline,) = result.report.declines
    assert (decline.rule, decline.node, decline.reason, decline.culprit) == (
        "returns",
        "middle",
        "it is not what it seems",
        "a",
    )
    assert result.report.declined == {("returns", "it is not what it seems"): 1}
    assert histogram(result.model) == histogram(parse(CHAIN))


def test_what_a_rule_is_not_about_is_no_decline():
    def decline(op, x, y):
        raise NotApplicable

    report = rewriter.apply(parse(CHAIN), [Returns(decline)]).report
    assert not report.declines and not report.applications


def test_a_rule_that_builds_and_then_declines_leaves_no_trace():
    def build(op, x, y):
        op.Abs(x)
        raise Declined("after all not", y)

    model = parse(CHAIN)
    result = rewriter.apply(model, [Returns(build), Drop("Identity")])
    assert result.report.applied == {"drop-identity": 2}
    assert histogram(result.model) == {"Relu": 1}


@pytest.mark.parametrize("proved", ["none", "class", "all"])
def test_observing_never_changes_what_happens(proved):
    told = []
    plain = rewriter.apply(parse(CHAIN), [Drop()], overrides=NO_PROOF)
    watched = rewriter.apply(
        parse(CHAIN), [Drop()], overrides={"parity.local": proved}, progress=lambda *state: told.append(state)
    )
    assert snapshot(plain.model) == snapshot(watched.model)


def test_the_same_input_gives_the_same_bytes():
    rules = [RemoveDouble(), Drop(), Swap("Relu", "Max")]
    first, second = (snapshot(rewriter.apply(parse(CHAIN), rules, overrides=NO_PROOF).model) for _ in range(2))
    assert first == second


def test_rules_may_be_classes_instances_or_compiled():
    built = pattern.RewriteRule(lambda op, x: op.Identity(x), lambda op, x: x, name="compiled")
    longer = CHAIN.replace("[last] y = Identity (b)", "c = Relu (b) y = Identity (c)")
    for rule in (RemoveDouble, Drop(), Drop().rule(), built):
        assert rewriter.apply(parse(longer), [rule]).report.applications


def test_what_was_made_while_nothing_is_collected_is_not_scanned_right_afterwards():
    seen = []

    def told(phase, about):
        seen.append((phase, about["generation"]))

    gc.callbacks.append(told)
    try:
        with without_cycle_collection():
            held = [[] for _ in range(100_000)]
        held += [[] for _ in range(100)]
        assert not seen and gc.isenabled() and not gc.get_freeze_count()
        held[0].append(held)
        del held
        assert gc.collect() > 100_000, "nothing is kept for good"
    finally:
        gc.callbacks.remove(told)


def test_what_is_set_aside_is_not_scanned_meanwhile_and_what_comes_is():
    held = [[] for _ in range(10_000)]
    with set_aside():
        assert gc.get_freeze_count() > 10_000
        with set_aside():
            held[0].append(held)
        assert gc.get_freeze_count(), "who came first decides for how long"
        cycle = []
        cycle.append(cycle)
        del cycle
        assert gc.collect(0) > 0
    assert not gc.get_freeze_count()


class Fuse(RewriteRuleClassBase):
    """Two products of one x -> one product and a Split: a pattern of two outputs."""

    def pattern(self, op, x, a, b):
        return op.MatMul(x, a), op.MatMul(x, b)

    def check(self, context, x, a, b):
        return a is not b

    def rewrite(self, op, x, a, b):
        weight = op.initializer(ir.tensor(np.hstack([a.const_value.numpy(), b.const_value.numpy()]), name="ab"))
        return op.Split(op.MatMul(x, weight), axis=-1, num_outputs=2, _outputs=2)


def test_outputs_of_one_rewrite_are_placed_before_all_their_readers():
    model = parse("""
        g (float[2,3] x) => (float[2,2] y)
           <float[3,2] a = {1,2,3,4,5,6}, float[3,2] b = {1,0,0,1,1,1}> {
           p = MatMul (x, a)
           early = Relu (p)
           q = MatMul (x, b)
           y = Add (early, q)
        }""")
    feeds = {"x": X}
    expected = run(model, feeds)["y"]
    result = rewriter.apply(model, [Fuse])
    assert result.report.applied == {"fuse": 1}
    assert histogram(result.model) == {"MatMul": 1, "Split": 1, "Relu": 1, "Add": 1}
    np.testing.assert_allclose(run(result.model, feeds)["y"], expected, rtol=1e-6)


def test_a_rewrite_that_would_feed_itself_is_refused():
    class Twist(RewriteRuleClassBase):
        """Relu(x), Abs(z) -> one node that reads x and z; z depends on the Relu."""

        def pattern(self, op, x, z):
            return op.Relu(x), op.Abs(z)

        def rewrite(self, op, x, z):
            both = op.Add(x, z)
            return op.Identity(both), op.Identity(both)

    model = parse("g (float[2,3] x) => (float[2,3] y) { a = Relu (x) z = Neg (a) y = Abs (z) }")
    with pytest.raises(RuleError, match="depends on"):
        rewriter.apply(model, [Twist], overrides=NO_PROOF)


def test_a_value_that_others_read_is_not_removed():
    model = parse("g (float[2,3] x) => (float[2,3] y, float[2,3] a) { a = Relu (x) y = Relu (a) }")
    result = rewriter.apply(model, [RemoveDouble()])
    assert not result.report.applications
    assert histogram(result.model) == {"Relu": 2}


def test_a_node_that_does_not_end_in_a_run_time_error_is_named_even_without_a_name():
    model = parse(CHAIN.replace("[middle] ", ""))
    with pytest.raises(RuleError) as caught:
        rewriter.apply(model, [Raises()])
    assert caught.value.node == "b"


def test_one_proof_for_each_structural_class_or_for_all():
    twice = CHAIN.replace("[last] y = Identity (b)", "c = Identity (b) y = Relu (c)")
    by_class = rewriter.apply(parse(twice), [Drop()], overrides={"parity.local": "class"}).report
    each = rewriter.apply(parse(twice), [Drop()], overrides={"parity.local": "all"}).report
    assert by_class.applied == each.applied == {"drop-identity": 2}
    assert len(by_class.proofs) <= len(each.proofs) == 2
