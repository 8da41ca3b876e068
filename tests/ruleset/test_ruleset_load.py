"""From a name, file, mapping or rules to a RuleSet: layers, overrides, round trips."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from onnxscript.rewriter.pattern import RewriteRule, RewriteRuleClassBase

from rewriter.errors import RuleSetError
from rewriter.quantize.plan import Override, QuantizationPlan, Selector
from rewriter.quantize.types import WeightSpec
from rewriter.ruleset import BoundRule, ParitySettings, Phase, RuleSet, load, parse_override

DEFAULTS = {"accuracy_level": 0, "mode": "exact", "scale": None, "names": (), "axes": [], "flag": False}
FULL = """\
description: Everything.
extends: base
target: cuda
phases:
  - name: second
    max_sweeps: 3
    rules:
      - drop-cast
      - drop-identity: {accuracy_level: 4, mode: fast, scale: 2, names: [a, b], axes: [1], flag: yes}
  - name: first
    rules:
      - drop-cast:
quantization:
  default: {bits: 2, symmetric: false}
  include: [{role: "expert.*"}]
  overrides:
    - {role: lm_head, bits: 8}
    - {nodes: ["*/a", b], layers: [0-3, 5, 24-], weights: "w?", algorithm: k-quant, block_size: 0}
parity: {local: all, seed: 7, max_relative_l2: 0.5, min_snr_db: 20, min_top1: 0.9}
"""


class MatMulToNBits2D(RewriteRuleClassBase):
    def pattern(self, op, x):
        return op.MatMul(x, x)

    def rewrite(self, op, x):
        return x


def test_everything(toy, write):
    found = load(write(FULL))
    assert found == RuleSet(
        name="set",
        description="Everything.",
        phases=(
            Phase("first", (BoundRule("drop-cast", {}, ()),)),
            Phase(
                "second",
                (
                    BoundRule("drop-cast", {}, ()),
                    BoundRule(
                        "drop-identity",
                        DEFAULTS
                        | {"accuracy_level": 4, "mode": "fast", "scale": 2.0, "names": ("a", "b"), "axes": [1]}
                        | {"flag": True},
                        (),
                    ),
                ),
                max_sweeps=3,
            ),
        ),
        plan=QuantizationPlan(
            default=WeightSpec(bits=2, block_size=64, symmetric=False),
            include=(Selector(role=("expert.*",)),),
            exclude=(Selector(role=("router",)),),
            overrides=(
                Override(Selector(role=("lm_head",)), {"bits": 8}),
                Override(
                    Selector(("*/a", "b"), ("w?",), (), found.plan.overrides[1].selector.layers),
                    {"algorithm": "k-quant", "lossless": False, "block_size": 0},
                ),
            ),
        ),
        parity=ParitySettings("all", 7, 0.5, 20.0, 0.9),
        target="cuda",
    )
    assert str(found.plan.overrides[1].selector) == "node */a or b, weight w?, layer 0-3 or 5 or 24-"
    assert [len(rule.rules) for rule in found.phases[1].rules] == [1, 2]
    assert found.plan.include[0].where == "set.yaml:15:13"
    assert found.plan.exclude[0].where == f"{toy}/sets/base.yaml:7:13"
    assert [override.selector.where for override in found.plan.overrides] == ["set.yaml:17:7", "set.yaml:18:7"]


def test_defaults_come_from_the_dataclasses(toy):
    found = load({"phases": [{"name": "a", "rules": ["drop-identity"]}]})
    rule = BoundRule("drop-identity", DEFAULTS, ())
    assert found == RuleSet("inline", phases=(Phase("a", (rule,)),))
    assert found.plan == QuantizationPlan() and found.plan.default == WeightSpec()


def test_file_mapping_and_rule_set_agree(toy, write):
    from_file = load(write(FULL))
    parsed = load(yaml.safe_load(FULL))
    assert parsed.phases == from_file.phases and parsed.plan == from_file.plan and parsed.parity == from_file.parity
    assert load(from_file) is from_file
    assert load(Path("set.yaml")) == from_file == load(os.path.abspath("set.yaml"))  # noqa: PTH100


def test_shipped_name_wins_over_a_file_of_that_name(toy, write):
    write("phases: [{name: x, rules: [drop-cast]}]", "base")
    assert load("base").description == "A base."
    assert load("./base").phases[0].name == "x"
    write("phases: [{name: x, rules: [drop-cast]}]", "other")
    assert load("other").name == "other"


def test_later_base_wins_and_each_is_read_once(toy, write):
    layer = "extends: base\nquantization: {{overrides: [{{role: x, bits: {bits}}}], default: {{bits: {bits}}}}}\n"
    write(layer.format(bits=2) + "description: two\n", "sub/two.yaml")
    write(layer.format(bits=4), "sub/four.yaml")
    write("quantization: {overrides: [{role: b, bits: 8}]}\nextends: [two.yaml, four.yaml]", "sub/both.yaml")
    found = load(write("extends: [sub/both.yaml, sub/two.yaml]\nquantization: {drop: [{role: router}]}"))
    assert found.description == "two"
    assert found.plan.default == WeightSpec(bits=4, block_size=64)
    assert [override.changes["bits"] for override in found.plan.overrides] == [2, 4, 8]
    assert found.plan.exclude == ()
    assert len(found.phases) == 1


def test_what_is_excluded_is_added_to_what_the_base_excludes(toy, write):
    """A set of one's own that keeps another weight float must not quantize the router that its base keeps float."""
    found = load(write("extends: base\nquantization: {exclude: [{role: lm_head}], include: [{role: 'a*'}]}"))
    assert found.plan.exclude == (Selector(role=("router",)), Selector(role=("lm_head",)))
    assert found.plan.include == (Selector(role=("a*",)),)
    set_by_key = load("base", overrides={"quantization.exclude": [{"role": "lm_head"}]})
    assert [selector.role for selector in set_by_key.plan.exclude] == [("router",), ("lm_head",)]


def test_an_entry_of_the_base_is_dropped_as_it_is_written(toy, write):
    text = "extends: base\nquantization: {drop: [{role: router}], exclude: [{role: lm_head}], include: [{role: x}]}"
    write(text, "two.yaml")
    assert load(write("extends: ./two.yaml")).plan.exclude == (Selector(role=("lm_head",)),)
    third = load(write("extends: ./two.yaml\nquantization: {drop: [{role: [x]}, {role: lm_head}]}"))
    assert (third.plan.include, third.plan.exclude) == ((), ())


def test_replaced_phase_keeps_its_place(toy, write):
    write("phases: [{name: a, rules: [drop-cast]}, {name: b, rules: [drop-cast]}]", "x.yaml")
    found = load(write("extends: x.yaml\nphases: [{name: c, rules: [drop-cast]}, {name: a, rules: [drop-identity]}]"))
    assert [(phase.name, phase.rules[0].name) for phase in found.phases] == [
        ("a", "drop-identity"),
        ("b", "drop-cast"),
        ("c", "drop-cast"),
    ]


def test_options_reach_a_rule_in_every_phase(toy, write):
    write(
        "phases: [{name: a, rules: [drop-identity: {mode: fast}]}, {name: b, rules: [drop-identity, drop-cast]}]",
        "x.yaml",
    )
    text = "extends: x.yaml\noptions: {drop-identity: {accuracy_level: 4}}"
    found = load(write(text), overrides={"options.drop-identity.flag": True})
    first, second = (phase.rules[0].options for phase in found.phases)
    assert (first["mode"], first["accuracy_level"], first["flag"]) == ("fast", 4, True)
    assert (second["mode"], second["accuracy_level"], second["flag"]) == ("exact", 4, True)
    assert found.phases[1].rules[1].options == {}


def test_anchors_and_merge_keys(toy, write):
    text = """
    phases:
      - &first {name: a, rules: &rules [drop-cast, drop-identity]}
      - {<<: *first, name: b}
      - {name: c, rules: *rules}
    """
    phases = load(write(text)).phases
    assert [phase.name for phase in phases] == ["a", "b", "c"]
    assert phases[0].rules == phases[1].rules == phases[2].rules


def test_overrides_are_the_last_layer(toy):
    base = load("base")
    overrides = {
        "quantization.default.bits": 4,
        "quantization.overrides": ({"layers": (1, "2-3"), "bits": 8},),
        "parity.local": "none",
        "target": "cpu",
    }
    found = load("base", overrides=overrides)
    assert found == load(base, overrides=overrides)
    assert found.plan.default == WeightSpec(bits=4, block_size=64)
    assert found.plan.overrides == (Override(Selector(layers=(range(1, 2), range(2, 4))), {"bits": 8}),)
    assert found.plan.overrides[0].selector.where == "override quantization.overrides[0]"
    assert found.plan.exclude == base.plan.exclude and found.phases == base.phases
    assert (found.parity.local, found.target) == ("none", "cpu")
    assert load("base", overrides={}) == base


def test_list_of_rules(toy):
    named = MatMulToNBits2D.rule()
    anonymous = RewriteRule(lambda op, x: op.Identity(x), lambda op, x: x)
    rules = load([MatMulToNBits2D, MatMulToNBits2D("own-name"), named, anonymous, "drop-cast"]).phases[0].rules
    assert [rule.name for rule in rules] == [
        "mat-mul-to-n-bits2-d",
        "own-name",
        "mat-mul-to-n-bits2-d",
        "rewrite-rule",
        "drop-cast",
    ]
    assert rules[2].rules == (named,) and rules[3].rules == (anonymous,)
    assert load([MatMulToNBits2D], overrides={"quantization.default.bits": 8}).plan.default.bits == 8


def test_rule_class_that_needs_arguments():
    class Needy(MatMulToNBits2D):
        def __init__(self, level):
            super().__init__()

    with pytest.raises(RuleSetError, match=r"^rules \[0\]: cannot make the rule: TypeError: "):
        load([Needy])
    with pytest.raises(RuleSetError, match=r"^rules \[0\]: a rule is an onnxscript rule or a rule's id, not int"):
        load([int])


def test_parse_override():
    assert parse_override("quantization.default.bits=8") == ("quantization.default.bits", 8)
    assert parse_override("quantization.exclude=[{role: a=b}]") == ("quantization.exclude", [{"role": "a=b"}])
    for text in ("bits", "=8", ""):
        with pytest.raises(RuleSetError, match="is not of the form key=value"):
            parse_override(text)
    with pytest.raises(RuleSetError, match=r"^override a:1:2: not valid YAML: [^\n]*$"):
        parse_override("a=[")


def with_default(default):
    return {
        "description": "A test.",
        "phases": [{"name": "p", "rules": ["unstack"]}],
        "quantization": {"default": yaml.safe_load(default)},
    }


@pytest.mark.parametrize(
    ("algorithm", "name", "lossless"),
    [("rtn", "rtn", False), ("[lossless, rtn]", "rtn", True), ("lossless", "lossless", True), ("[rtn]", "rtn", False)],
)
def test_lossless_may_stand_before_another_algorithm(algorithm, name, lossless):
    spec = load(with_default(f"{{algorithm: {algorithm}}}")).plan.default
    assert (spec.algorithm, spec.lossless) == (name, lossless)


@pytest.mark.parametrize("algorithm", ["[rtn, k-quant]", "[lossless, rtn, rtn]", "[lossless, lossless]", "[]", "[rnt]"])
def test_no_other_list_of_algorithms_is_one(algorithm):
    with pytest.raises(RuleSetError, match="algorithm"):
        load(with_default(f"{{algorithm: {algorithm}}}"))


def test_a_format_says_bits_and_blocks():
    spec = load(with_default("{bits: 8, format: nvfp4}")).plan.resolve(node="", weight="", role="", layer=None)
    assert (spec.format, spec.bits, spec.block_size, spec.symmetric) == ("nvfp4", 4, 16, True)
