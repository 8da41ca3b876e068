"""The commit: names, constants, metadata and order, whatever the model already holds."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnxscript.rewriter import RULE_NAME_TAG, RewriteRuleClassBase
from support import Constant, Drop, Swap, histogram, names, parse, run

import rewriter
from rewriter.engine.commit import Committer
from rewriter.errors import RuleError
from rewriter.rule import Rule
from rewriter.tensors import constant

NO_PROOF = {"parity.local": "none"}
X = np.linspace(-2, 2, 6, dtype=np.float32).reshape(2, 3)
W = "<float[3,2,2] W = {0,1,2,3,4,5,6,7,8,9,10,11}, int64 zero = {0}, int64 one = {1}>"


def apply(model, *rules, **overrides):
    return rewriter.apply(model, list(rules), overrides=overrides or NO_PROOF)


TWO = "g (float[2,3] x) => (float[2,3] y) { a = Relu (x) y = Relu (a) }"


def fresh():
    return ir.tensor(np.full((2, 3), 2, np.float32), name="c")


def test_names_are_unique_whatever_is_taken():
    model = parse("""
        g (float[2,3] x) => (float[2,3] y) <float[2,3] c = {1,2,3,4,5,6}, float[2,3] c_1 = {1,2,3,4,5,6}> {
           [n] a = Relu (x)
           [n_Add] b = Add (a, c)
           [n_Add_1] n_Add_out = Add (b, c_1)
           [n] y = Relu (n_Add_out)
        }""")
    result = apply(model, Constant(fresh))
    taken = names(result.model)
    assert len(taken) == len(set(taken))
    run(result.model, {"x": X})


def test_names_are_unique_across_graphs():
    model = parse("""
        g (float[2,3] x, bool c) => (float[2,3] y) {
           a = Relu (x)
           y = If (c) <then_branch = t () => (float[2,3] u) <float[2,3] c_1 = {1,2,3,4,5,6}> {
                          b = Add (a, c_1) u = Relu (b) },
                       else_branch = e () => (float[2,3] u) { b = Abs (a) u = Relu (b) }>
        }""")
    result = apply(model, Constant(fresh))
    assert result.report.applied == {"constant": 3}
    out = run(result.model, {"x": X, "c": np.array(False)})["y"]
    np.testing.assert_array_equal(out, np.abs(X + 2) + 2)


def test_nodes_without_names_get_one_each():
    result = apply(parse(TWO.replace("[", "[")), Swap("Relu", "Abs"))
    given = [node.name for node in result.model.graph]
    assert all(given) and len(set(given)) == len(given)


OUTPUTS = {
    "an input": "g (float[2,3] x) => (float[2,3] y) { y = Abs (x) }",
    "a value": "g (float[2,3] x) => (float[2,3] y) { a = Relu (x) y = Abs (a) }",
    "a value that others read": "g (float[2,3] x) => (float[2,3] y, float[2,3] z) {"
    " a = Relu (x) y = Abs (a) z = Neg (a) }",
    "another output": "g (float[2,3] x) => (float[2,3] y, float[2,3] a) { a = Relu (x) y = Abs (a) }",
    "one value for two": "g (float[2,3] x) => (float[2,3] y, float[2,3] z) { a = Relu (x) y = Abs (a) z = Abs (a) }",
    "an initializer": "g (float[2,3] x) => (float[2,3] y, float[2,3] z)"
    " <float[2,3] w = {1,2,3,4,5,6}> { y = Abs (w) z = Relu (x) }",
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_graph_outputs_keep_their_names_and_order(kind):
    model = parse(OUTPUTS[kind])
    feeds = {"x": np.abs(X)}
    expected = run(model, feeds)
    result = apply(model, Drop("Abs"))
    assert result.report.applied["drop-abs"] == histogram(model)["Abs"]
    actual = run(result.model, feeds)
    assert list(actual) == list(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value)


def test_an_identity_that_names_an_output_stays_and_the_engine_ends():
    model = parse("g (float[2,3] x) => (float[2,3] y) { y = Identity (x) }")
    result = apply(model, Drop())
    assert not result.report.applied
    assert [d.reason for d in result.report.declines] == ["the Identity is what names 'y'"]


def test_one_new_value_for_two_graph_outputs():
    class Merge(RewriteRuleClassBase):
        def pattern(self, op, x):
            return op.Abs(x), op.Neg(x)

        def rewrite(self, op, x):
            both = op.Relu(x)
            return both, both

    model = parse("g (float[2,3] x) => (float[2,3] y, float[2,3] z) { y = Abs (x) z = Neg (x) }")
    result = apply(model, Merge)
    assert [value.name for value in result.model.graph.outputs] == ["y", "z"]
    out = run(result.model, {"x": X})
    np.testing.assert_array_equal(out["y"], out["z"])


def test_a_rewrite_that_reads_what_it_replaces_is_refused():
    class Clip(RewriteRuleClassBase):
        def pattern(self, op, x):
            return op.Relu(x, _outputs=["y"])

        def rewrite(self, op, x, y):
            return op.Abs(y)

    with pytest.raises(RuleError, match="reads 'a', which it replaces"):
        apply(parse(TWO), Clip)


class OneOfTwo(Rule):
    """The first output of a Split -> a Slice; the Split lives on for the other."""

    def __init__(self):
        super().__init__(name="one-of-two", remove_nodes=False)

    def pattern(self, op, x):
        return op.Split(x, _allow_other_attributes=True, _outputs=["a", "b"])

    def rewrite(self, op, x, a, b):
        from rewriter.rule import NotApplicable

        if not a.uses():
            raise NotApplicable
        bounds = [op.initializer(ir.tensor(np.array([i], np.int64), name=f"i{i}")) for i in (0, 1)]
        return {a: op.Slice(x, bounds[0], bounds[1], bounds[0])}


def test_a_node_may_lose_one_output_and_keep_the_other():
    model = parse("""
        g (float[2,3] x) => (float[1,3] y) {
           a, b = Split <axis = 0, num_outputs = 2> (x)
           n = Neg (a)
           y = Sub (n, b)
        }""")
    result = apply(model, OneOfTwo())
    assert histogram(result.model) == {"Split": 1, "Slice": 1, "Neg": 1, "Sub": 1}
    taken = names(result.model)
    assert len(taken) == len(set(taken))
    np.testing.assert_array_equal(run(result.model, {"x": X})["y"], -X[:1] - X[1:])


class Negated(RewriteRuleClassBase):
    """x - c -> -x, written for this test alone."""

    def pattern(self, op, x, c):
        return op.Sub(x, c)

    def rewrite(self, op, x, c):
        return op.Neg(x)


def test_a_constant_that_many_read_is_looked_at_once_when_its_last_reader_went(monkeypatch):
    looks = []
    uses = ir.Value.uses
    monkeypatch.setattr(ir.Value, "uses", lambda value: [looks.append(value.name), uses(value)][1])
    readers = " ".join(f"v{i + 1} = Sub (v{i}, c)" for i in range(50))
    model = parse(f"g (float[2] v0) => (float[2] y) {{ c = Constant <value_float = 1.0> () {readers} y = Relu (v50) }}")
    assert histogram(apply(model, Negated()).model) == {"Neg": 50, "Relu": 1}
    assert looks.count("c") < 10


def test_metadata_and_documents_go_to_what_replaces_their_node():
    model = parse(TWO)
    for number, node in enumerate(model.graph):
        node.metadata_props[f"key{number}"] = "kept"
        node.doc_string = f"document {number}"

    class Double(RewriteRuleClassBase):
        def pattern(self, op, x):
            return op.Relu(op.Relu(x))

        def rewrite(self, op, x):
            return op.Relu(x)

    (node,) = apply(model, Double).model.graph
    assert node.metadata_props == {"key0": "kept", "key1": "kept", RULE_NAME_TAG: "double"}
    assert sorted(node.doc_string.splitlines()) == ["document 0", "document 1"]


def test_a_new_node_may_read_what_is_computed_after_the_node_it_replaces():
    class Reach(RewriteRuleClassBase):
        """Relu(x) -> the Neg that stands later, and does not need it."""

        def pattern(self, op, x):
            return op.Relu(x)

        def rewrite(self, op, x):
            return op.Max(x, next(use.node for use in x.uses() if use.node.op_type == "Neg").outputs[0])

    model = parse("g (float[2,3] x) => (float[2,3] y) { a = Relu (x) b = Abs (a) n = Neg (x) y = Add (b, n) }")
    out = run(apply(model, Reach).model, {"x": X})["y"]
    np.testing.assert_array_equal(out, np.abs(X) - X)


def test_the_survey_knows_every_graph():
    model = parse("""
        g (float[2,3] x, bool c) => (float[2,3] y) <float[2] w = {1, 2}> {
           y = If (c) <then_branch = t () => (float[2,3] u) { u = Neg (x) },
                       else_branch = e () => (float[2,3] u) { u = Abs (x) }>
        }""")
    committer = Committer(model)
    for graph in model.graphs():
        assert committer.imports(graph)[""] == 21
    assert constant(model.graph.initializers["w"]) is not None
