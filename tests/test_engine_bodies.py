"""The engine in the bodies of control flow and in functions."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnxscript.rewriter import RewriteRuleClassBase
from support import Drop, Swap, histogram, parse, run

import rewriter

NO_PROOF = {"parity.local": "none"}
CHAIN = "g (float[2,3] x) => (float[2,3] y) { a = Identity (x) b = Relu (a) y = Identity (b) }"
X = np.linspace(-2, 2, 6, dtype=np.float32).reshape(2, 3)

BODIES = {
    "if": """
        g (float[2,3] x, bool c) => (float[2,3] y) {
           y = If (c) <then_branch = t () => (float[2,3] u) { v = Relu (x) u = Identity (v) },
                       else_branch = e () => (float[2,3] u) { v = Abs (x) w = Identity (v) u = Neg (w) }>
        }""",
    "loop": """
        g (float[2,3] x, bool c) => (float[2,3] y) <int64 n = {2}> {
           y = Loop (n, c, x) <body = b (int64 i, bool go, float[2,3] s) => (bool on, float[2,3] u) {
              on = Identity (go)  v = Relu (s)  w = Identity (v)  u = Neg (w) }>
        }""",
    "scan": """
        g (float[2,3] x, bool c) => (float[2,3] y) {
           y = Scan <num_scan_inputs = 1, body = b (float[3] r) => (float[3] u) {
              v = Relu (r)  w = Identity (v)  u = Neg (w) }> (x)
        }""",
}


@pytest.mark.parametrize("kind", BODIES)
def test_bodies_of_control_flow_are_rewritten(kind):
    model = parse(BODIES[kind])
    feeds = {"x": X, "c": np.array(True)}
    expected = run(model, feeds)["y"]
    result = rewriter.apply(model, [Drop()])
    assert result.report.applied["drop-identity"] >= 1
    np.testing.assert_array_equal(run(result.model, feeds)["y"], expected)
    assert histogram(result.model)["Identity"] < histogram(model)["Identity"]


FUNCTION = """
g (float[2,3] x) => (float[2,3] y) { y = local.F (x) }
"""
BODY = """
<domain: "local", opset_import: ["" : {opset}]>
F (x) => (y) {{ a = Relu (x)  b = Abs (a)  y = Neg (b) }}
"""


@pytest.mark.parametrize("opset", [21, 17])
def test_functions_are_rewritten_in_their_own_opset(opset):
    model = parse(FUNCTION, functions=BODY.format(opset=opset), domains=', "local" : 1')
    result = rewriter.apply(model, [Swap("Abs", "Relu")], overrides=NO_PROOF)
    assert result.report.applied == {"abs-to-relu": 1}
    np.testing.assert_array_equal(run(result.model, {"x": X})["y"], -np.maximum(X, 0))


def test_a_functions_new_constants_are_nodes():
    class AddZero(RewriteRuleClassBase):
        def pattern(self, op, x):
            return op.Abs(x)

        def rewrite(self, op, x):
            return op.Add(x, op.initializer(ir.tensor(np.float32(0), name="zero")))

    model = parse(FUNCTION, functions=BODY.format(opset=21), domains=', "local" : 1')
    result = rewriter.apply(model, [AddZero], overrides=NO_PROOF)
    assert histogram(result.model)["Constant"] == 1
    np.testing.assert_array_equal(run(result.model, {"x": X})["y"], -np.maximum(X, 0))


TAKEN = """
<domain: "local", opset_import: ["" : 21]>
F (x, yes) => (y) {
   a = If (yes) <then_branch = g1 () => (b) { c = Abs (x) b = Identity (c) },
                 else_branch = g2 () => (d) { c = Abs (x) e = Neg (c) f = Abs (e) d = Identity (f) }>
   y = Abs (a)
}
"""


def test_a_functions_constants_are_shared_by_its_subgraphs():
    """One Constant at the top of the body, whose name no subgraph has; a subgraph's output is computed in it."""

    class Two(RewriteRuleClassBase):
        def pattern(self, op, x):
            return op.Abs(x)

        def rewrite(self, op, x):
            return op.initializer(ir.tensor(np.full((2, 3), 2, np.float32), name="c"))

    text = "g (float[2,3] x, bool yes) => (float[2,3] y) { y = local.F (x, yes) }"
    model = parse(text, functions=TAKEN, domains=', "local" : 1')
    result = rewriter.apply(model, [Two], overrides=NO_PROOF)
    assert result.report.applied == {"two": 4} and histogram(result.model)["Constant"] == 1
    np.testing.assert_array_equal(run(result.model, {"x": X, "yes": np.array(False)})["y"], np.full((2, 3), 2))


@pytest.mark.parametrize("where", ["graph", "function"])
def test_opset_imports_are_merged_where_the_node_goes(where):
    model = (
        parse(CHAIN) if where == "graph" else parse(FUNCTION, functions=BODY.format(opset=17), domains=', "local" : 1')
    )
    rule = Swap("Relu", "Gelu", domain="com.microsoft")
    result = rewriter.apply(model, [rule], overrides=NO_PROOF)
    assert "com.microsoft" not in model.opset_imports
    assert result.model.opset_imports["com.microsoft"] == 1
    for function in result.model.functions.values():
        assert function.opset_imports["com.microsoft"] == 1
    run(result.model, {"x": X})


class Branch(RewriteRuleClassBase):
    """Relu(x) -> an If, both branches of which read x."""

    def pattern(self, op, x):
        return op.Relu(x)

    def rewrite(self, op, x):
        def branch(name):
            node = ir.node("Neg", [x], name=f"{name}_neg")
            node.outputs[0].name = f"{name}_out"
            return ir.Graph([], node.outputs, nodes=[node], opset_imports={"": 21}, name=name)

        yes = op.initializer(ir.tensor(np.array(True), name="yes"))
        return op.If(yes, then_branch=branch("t"), else_branch=branch("e"))


BRANCHING = "g (float[2,3] x, float[2,3] z) => (float[2,3] y) { a = Abs (x) b = Relu (a) y = Add (b, z) }"


def test_bodies_that_a_rule_made_are_rewritten():
    result = rewriter.apply(parse(BRANCHING), [Branch(), Swap("Neg", "Exp")], overrides=NO_PROOF)
    assert result.report.applied == {"branch": 1, "neg-to-exp": 2}
    assert histogram(result.model) == {"Abs": 1, "If": 1, "Exp": 2, "Add": 1}


def test_bodies_that_a_rule_made_go_with_all_that_only_they_read():
    class Last(RewriteRuleClassBase):
        def pattern(self, op, c, z):
            return op.Add(op.If(c), z)

        def rewrite(self, op, c, z):
            return op.Identity(z)

    result = rewriter.apply(parse(BRANCHING), [Branch(), Last()], overrides=NO_PROOF)
    assert histogram(result.model) == {"Identity": 1}
