"""Selectors and plans: which weight gets which spec, and why another stays float."""

from __future__ import annotations

import fnmatch
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewriter.errors import RuleSetError
from rewriter.quantize.plan import Override, QuantizationPlan, Selector, parse_layers
from rewriter.quantize.types import WeightSpec
from rewriter.roles import ROLES
from rewriter.ruleset import Phase, RuleSet, load

NAMES = st.text("ab/.0", min_size=0, max_size=4)
GLOBS = st.lists(st.text("ab/.0*?", min_size=1, max_size=4), min_size=1, max_size=2).map(tuple)
RANGES = st.tuples(st.integers(0, 6), st.integers(0, 6)).map(sorted).map(tuple)
LAYERS = st.none() | st.integers(0, 8)
WEIGHTS = st.fixed_dictionaries({"node": NAMES, "weight": NAMES, "role": NAMES, "layer": LAYERS})
SELECTORS = st.builds(
    Selector,
    nodes=st.just(()) | GLOBS,
    weights=st.just(()) | GLOBS,
    role=st.just(()) | GLOBS,
    layers=st.lists(RANGES.map(lambda ends: range(ends[0], ends[1] + 1)), max_size=2).map(tuple),
)
CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "bits": st.sampled_from([2, 4, 8]),
        "block_size": st.sampled_from([0, 16, 256]),
        "symmetric": st.booleans(),
        "algorithm": st.sampled_from(["rtn", "k-quant", "custom"]),
    },
)
PLANS = st.builds(
    QuantizationPlan,
    include=st.lists(SELECTORS, max_size=2).map(tuple),
    exclude=st.lists(SELECTORS.filter(lambda selector: selector != Selector()), max_size=2).map(tuple),
    overrides=st.lists(st.builds(Override, SELECTORS, CHANGES), max_size=3).map(tuple),
)
BASE = RuleSet("base", phases=(Phase("none", ()),))


def as_yaml(selector):
    """The mapping that reads back as this selector."""
    layers = [f"{r.start}-" if r.stop == sys.maxsize else f"{r.start}-{r.stop - 1}" for r in selector.layers]
    fields = {"nodes": selector.nodes, "weights": selector.weights, "role": selector.role, "layers": layers}
    return {name: list(entries) for name, entries in fields.items() if entries}


@given(SELECTORS, WEIGHTS)
def test_selector_is_the_conjunction_of_its_fields(selector, weight):
    def hit(globs, name):
        return not globs or any(fnmatch.fnmatchcase(name, glob) for glob in globs)

    layers = [layer for layer in range(9) if any(layer in r for r in selector.layers)]
    assert selector.matches(**weight) == (
        hit(selector.nodes, weight["node"])
        and hit(selector.weights, weight["weight"])
        and hit(selector.role, weight["role"])
        and (not selector.layers or weight["layer"] in layers)
    )


@given(SELECTORS, SELECTORS, WEIGHTS)
def test_more_fields_pick_no_more_and_more_entries_no_less(one, two, weight):
    pairs = ((one.nodes, two.nodes), (one.weights, two.weights), (one.role, two.role), (one.layers, two.layers))
    narrower = Selector(*(first or second for first, second in pairs))
    assert one.matches(**weight) >= narrower.matches(**weight)
    if one.nodes and two.nodes:
        wider = Selector((*one.nodes, *two.nodes), one.weights, one.role, one.layers)
        assert wider.matches(**weight) >= one.matches(**weight)


@given(PLANS, WEIGHTS)
def test_resolve_is_default_then_overrides_in_order(plan, weight):
    found = plan.resolve(**weight)
    included = not plan.include or any(selector.matches(**weight) for selector in plan.include)
    excluded = any(selector.matches(**weight) for selector in plan.exclude)
    assert isinstance(found, str) == (excluded or not included)
    if isinstance(found, WeightSpec):
        for name in ("algorithm", "bits", "block_size", "symmetric"):
            value = getattr(plan.default, name)
            for override in plan.overrides:
                if override.selector.matches(**weight):
                    value = override.changes.get(name, value)
            assert getattr(found, name) == value


@given(st.lists(SELECTORS.filter(lambda selector: selector != Selector()), min_size=1, max_size=3))
def test_selectors_round_trip_through_the_format(selectors):
    mapping = [as_yaml(selector) for selector in selectors]
    overrides = {"quantization.include": mapping, "quantization.exclude": mapping}
    plan = load(BASE, overrides=overrides).plan
    assert plan.include == plan.exclude == tuple(selectors)


@given(PLANS, st.lists(st.tuples(NAMES, NAMES), max_size=5))
def test_unmatched_is_what_matches_no_name(plan, seen):
    selectors = [*plan.include, *plan.exclude, *(override.selector for override in plan.overrides)]
    nodes, weights = {node for node, _ in seen}, {weight for _, weight in seen}
    missed = [
        (kind, glob)
        for selector in selectors
        for kind, globs, names in (
            ("node", selector.nodes, nodes),
            ("weight", selector.weights, weights),
            ("role", selector.role, ROLES),
        )
        for glob in globs
        if not fnmatch.filter(names, glob)
    ]
    assert [(found.kind, found.glob) for found in plan.unmatched(iter(seen), ROLES)] == missed


@given(st.integers(0, 99), st.integers(0, 99), st.integers(0, 300))
def test_layer_ranges_include_both_ends(first, last, layer):
    if last >= first:
        assert (layer in parse_layers(f"{first}-{last}")[0]) == (first <= layer <= last)
    assert (layer in parse_layers(f"{first}-")[0]) == (layer >= first)
    assert parse_layers([first, f" {last} "]) == (range(first, first + 1), range(last, last + 1))


@pytest.mark.parametrize("value", ["", "-", "-3", "1-2-3", "3-1", "a", -1, True, 1.5, None, [], {}, [[1]], ["1", "x"]])
def test_what_is_no_layer_range(value):
    with pytest.raises(ValueError, match=r"layer range|ends before|is empty"):
        parse_layers(value)


def test_reasons():
    plan = QuantizationPlan(
        include=(Selector(role=("expert.*",)), Selector(layers=(range(4),))),
        exclude=(Selector(role=("router",), layers=(range(2, sys.maxsize),)), Selector(nodes=("*/x", "y"))),
    )
    weight = {"node": "n", "weight": "w", "role": "", "layer": None}
    assert plan.resolve(**weight) == "not included by the plan (no role)"
    assert plan.resolve(**weight | {"role": "lm_head"}) == "not included by the plan (role lm_head)"
    assert plan.resolve(**weight | {"role": "router", "layer": 2}) == "excluded by the plan (role router, layer 2-)"
    assert plan.resolve(**weight | {"layer": 2, "node": "a/x"}) == "excluded by the plan (node */x or y)"
    assert plan.resolve(**weight | {"role": "expert.down"}) == WeightSpec()


def test_unmatched_names_place_and_nearest():
    plan = QuantizationPlan(
        exclude=(Selector(nodes=("*/lm_haed/*",), where="x.yaml:3:5"), Selector(nodes=("*/lm_head/*",))),
        overrides=(Override(Selector(weights=("zzz",), role=("none",), layers=(range(1),)), {"bits": 8}),),
    )
    assert list(map(str, plan.unmatched([("/lm_head/MatMul", "lm_head.weight")], ROLES))) == [
        "x.yaml:3:5: node pattern '*/lm_haed/*' matches nothing in the model (did you mean '*/lm_head/*'?)",
        "weight pattern 'zzz' matches nothing in the model",
        "role pattern 'none' matches no role",
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QuantizationPlan(WeightSpec(bits=5)), "'bits' of a weight's quantization is 5 (valid: 2"),
        (lambda: QuantizationPlan(WeightSpec(block_size=8)), "'block_size' of a weight's quantization is 8"),
        (lambda: QuantizationPlan(WeightSpec(block_size=False)), "'block_size' of a weight's quantization is False"),
        (lambda: QuantizationPlan(WeightSpec(algorithm="awq")), "'algorithm' of a weight's quantization is 'awq'"),
        (lambda: Override(Selector(), {"symmetric": 1}), "'symmetric' of a weight's quantization is 1"),
        (lambda: Override(Selector(), {"bit": 4}), "unknown field 'bit' of a weight's quantization (did you mean"),
    ],
)
def test_python_plans_are_checked_too(make, message):
    with pytest.raises(RuleSetError) as caught:
        make()
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("count", "sensitive"),
    [
        (2, [1]),
        (24, [0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23]),
        (28, [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27]),
        (30, [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29]),
    ],
)
def test_sensitive_layers_are_counted_in_integers(count, sensitive):
    plan = QuantizationPlan(overrides=(Override(Selector(layers=parse_layers("sensitive")), {"bits": 8}),))
    specs = [plan.resolve(node="", weight="", role="", layer=layer, count=count) for layer in range(count)]
    assert [layer for layer, spec in enumerate(specs) if spec.bits == 8] == sensitive
    assert plan.resolve(node="", weight="", role="lm_head", layer=None, count=count).bits == 4


def test_sensitive_layers_beside_ranges():
    assert parse_layers(["sensitive", "0-3"]) == ("sensitive", range(4))
    assert str(Selector(layers=("sensitive", range(4)))) == "layer sensitive or 0-3"


def test_a_pattern_that_equals_a_name_is_that_name():
    seen = [("/layers[0]/MatMul", "w[01]"), ("m*", "w0"), ("m1", "w1")]
    selectors = (Selector(nodes=("/layers[0]/MatMul",)), Selector(weights=("w[01]",)), Selector(nodes=("m*",)))
    given = QuantizationPlan(exclude=selectors, overrides=(Override(Selector(weights=("w[01]", "w?")), {"bits": 8}),))
    plan = given.named(seen)
    assert not plan.unmatched(seen, ROLES)

    def resolved(selector, node, weight):
        return plan_of(selector).resolve(node=node, weight=weight, role="", layer=None)

    def plan_of(selector):
        return QuantizationPlan(exclude=(selector,)).named(seen)

    for selector, taken in zip(selectors, ([0], [0], [1]), strict=True):
        kept = [index for index, pair in enumerate(seen) if isinstance(resolved(selector, *pair), str)]
        assert kept == taken
    assert given.named([("a", "b")]) == given
    assert isinstance(given.resolve(node="", weight="w0", role="", layer=None), str)  # without such a name, a pattern


def test_many_overrides_are_found_by_name():
    overrides = [Override(Selector(weights=(f"w{i}",)), {"bits": 8}) for i in range(100_000)]
    overrides += [Override(Selector(nodes=("n*",), weights=("w7", "w8")), {"bits": 2})]
    overrides += [Override(Selector(weights=("w*",), layers=(range(9),)), {"block_size": 16})]
    plan = QuantizationPlan(overrides=tuple(overrides))

    def form(node, weight, layer=None):
        spec = plan.resolve(node=node, weight=weight, role="", layer=layer)
        return spec.bits, spec.block_size

    default = plan.default.block_size
    assert [form("m", f"w{i}") for i in range(1000)] == [(8, default)] * 1000
    assert [form("n", "w7"), form("n", "w9", 3), form("n", "x")] == [(2, default), (8, 16), (4, default)]
    seen = [("n", f"w{i}") for i in range(1000)]
    assert len(plan.unmatched(seen, ())) == 99_000
