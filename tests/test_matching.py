"""A pattern of operators and variables is matched where onnxscript's own matcher matches it, with the same result."""

from __future__ import annotations

import pytest
from onnxscript.rewriter import RewriteRuleClassBase, pattern
from support import parse

from rewriter.facts import DeclineTracer
from rewriter.graph._onnxscript import compiled
from rewriter.graph.contents import all_nodes

MODEL = """
    g (float[2,4] x, bool c) => (float[2,4] y, float[2,1] largest, int64[2,1] where, float[2,2] s0, float[2,2] s1)
       <int64[1] one = {1}, float zero = {0}> {
       a = Relu (x)
       b = Clip (a, , zero)
       k = Constant <value_float = 1.0> ()
       y = Mul (b, k)
       largest, where = TopK (x, one)
       values, unread = TopK (a, one)
       s0, unused = Split <axis = 1, num_outputs = 2> (x)
       unused2, s1 = Split <axis = 1, num_outputs = 2> (y)
       g = Sigmoid (a)
       swish = Mul (a, g)
       double = Add (swish, swish)
       sum = Add (double, x)
       t0 = Transpose <perm = [1, 0]> (sum)
       t1 = Transpose <perm = [1, 0]> (t0)
       t2 = Transpose (t1)
       outer = Exp (t2)
       within = If (c) <then_branch = h () => (float[4,2] r) { e = Neg (outer) f = Neg (e) r = Abs (f) },
                        else_branch = i () => (float[4,2] q) { q = Neg (outer) }>
    }"""


class Pattern(RewriteRuleClassBase):
    """Whatever pattern it is given, and onnxscript's own check or another."""

    def __init__(self, shape, *, remove_nodes=True):
        super().__init__(remove_nodes=remove_nodes)
        self.pattern = shape

    def pattern(self, op):
        raise NotImplementedError

    def rewrite(self, op, **bindings):
        return op.Identity(bindings["x"])


class Checks(Pattern):
    def check(self, context, x, **bindings):
        assert context.root in context.nodes
        return x is not None and x.is_graph_input()


class Explains(Pattern):
    def check(self, context, x, **bindings):
        return pattern.MatchResult().fail(f"{len(bindings)} more", [context.root])


def at(operator):
    return lambda op, x: getattr(op, operator)(x, _allow_other_inputs=True, _outputs=["out"])


TREES = [
    *map(at, ["Relu", "Clip", "TopK", "Constant", "Split", "Neg", "If"]),
    lambda op, x: op.Relu(x),
    lambda op, x: op.Clip(x),
    lambda op, x, high: op.Clip(x, None, high),
    lambda op, x, low, high: op.Clip(x, low, high),
    lambda op, x, low, high, more: op.Clip(x, low, high, more),
    lambda op, x: op.Add(x, x),
    lambda op, x, z: op.Add(x, z),
    lambda op, x: op.Mul(x, op.Sigmoid(x)),
    lambda op, x: op.Mul(op.Sigmoid(x), x),
    lambda op, x, k: op.Mul(op.Clip(x, _allow_other_inputs=True, _outputs=["clipped"]), k),
    lambda op, x, k: op.TopK(x, k, _outputs=["values", "indices"]),
    lambda op, x: op.Transpose(op.Transpose(x, perm=[1, 0]), perm=[1, 0]),
    lambda op, x, p, q: op.Transpose(op.Transpose(x, perm=p), perm=q),
    lambda op, x, p: op.Transpose(op.Transpose(x, perm=p), perm=p),
    lambda op, x, p: op.Transpose(x, perm=pattern.AttrVar("p", can_match_none=True)),
    lambda op, x: op.Transpose(x, _allow_other_attributes=False),
    lambda op, x, unused: op.Exp(x),
    lambda op, x: op.Neg(op.Neg(x)),
    lambda op, x: op.Neg(op.Exp(x)),
    lambda op, x: op.Relu(x, _domain="ai.other"),
]


def told(matched):
    return matched and (matched.nodes, list(matched.outputs), list(matched.bindings.items()), matched.node_bindings)


@pytest.mark.parametrize("kind", [Pattern, Checks, Explains])
@pytest.mark.parametrize("remove_nodes", [True, False])
def test_a_tree_matches_where_onnxscript_matches_it(remove_nodes, kind):
    model = parse(MODEL)
    matches = 0
    for shape in TREES:
        rule = kind(shape, remove_nodes=remove_nodes)
        theirs = pattern.RewriteRule(rule.pattern, rule.rewrite, rule.check)
        ours = compiled(rule)
        assert type(ours) is not type(theirs)
        for node in all_nodes(model):
            tracers = DeclineTracer(), DeclineTracer()
            own, other = (
                told(each.match(model, node.graph, node, check_nodes_are_removable=remove_nodes, tracer=tracer)) or None
                for each, tracer in zip((ours, theirs), tracers, strict=True)
            )
            assert (own and own[:3]) == (other and other[:3]), node
            assert not own or list(own[3].values()) == list(other[3].values())
            assert tracers[0].reason == tracers[1].reason and tracers[0].culprits == tracers[1].culprits
            matches += own is not None
    assert matches or kind is Explains


@pytest.mark.parametrize(
    "shape",
    [
        lambda op, x: op.Add(x, 1),
        lambda op, x: op.Add(pattern.OrValue([op.Relu(x), op.Exp(x)]), x),
        lambda op, x: op.Relu(op.Exp(x, _check=lambda context, node: True)),
        lambda op, x, z: (op.Relu(x), op.Exp(z)),
    ],
)
def test_what_is_no_tree_is_left_to_onnxscript(shape):
    assert type(compiled(Pattern(shape))) is pattern.RewriteRule


def test_a_compiled_rule_is_matched_the_same_way_and_one_of_another_matcher_is_not():
    rule = pattern.RewriteRule(lambda op, x: op.Exp(x), lambda op, x: x)
    assert type(compiled(rule)) is not pattern.RewriteRule
    own = type("Own", (pattern.SimplePatternMatcher,), {})
    other = pattern.RewriteRule(lambda op, x: op.Exp(x), lambda op, x: x, matcher=own)
    assert compiled(other) is other


def test_a_node_with_fewer_outputs_than_the_pattern_is_no_match():
    model = parse(MODEL)
    rule = compiled(Pattern(lambda op, x, k: op.TopK(x, k, _outputs=3)))
    assert not any(rule.match(model, node.graph, node) for node in all_nodes(model))
