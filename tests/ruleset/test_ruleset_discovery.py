"""Rule packages: what is found, what a rule says of itself, what a broken one says."""

from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from rewriter.errors import RewriterWarning, RuleSetError
from rewriter.ruleset import catalogue, discover, json_schema, load, rule_sets

PHASES = {"phases": [{"name": "a", "rules": ["bad"]}]}


def test_catalogue(toy):
    plain, identity = catalogue()
    assert (plain.name, plain.title, plain.sections, plain.options) == ("drop-cast", "A rule without options.", {}, ())
    assert (identity.name, identity.package) == ("drop-identity", toy)
    assert identity.title == "A rule that removes an Identity."
    assert identity.sections == {
        "Matched": "Identity(x)",
        "Replacement": "x",
        "Declines when": "never,\never",
        "Source": "a test",
    }
    assert [(option.name, option.type, option.default) for option in identity.options] == [
        ("accuracy_level", "int", 0),
        ("mode", "fast or exact", "exact"),
        ("scale", "float or null", None),
        ("names", "a list of str", ()),
        ("axes", "a list of int", []),
        ("flag", "bool", False),
    ]
    assert [option.description for option in identity.options[:3]] == ["what it reaches for", "fast or exact", ""]


def test_rule_sets(toy):
    (base,) = rule_sets().values()
    assert (base.name, base.package, base.description) == ("base", toy, "A base.")
    assert base.path.endswith("base.yaml")


def test_same_id_in_two_packages(offer, texts):
    first, second = offer({"drop_cast.py": texts.plain}), offer({"drop_cast.py": texts.plain, "other.py": texts.plain})
    both = f"several packages offer the rule 'drop-cast': '{first}' and '{second}'; uninstall all but one"
    with pytest.raises(RuleSetError, match=rf"^{both}$"):
        load(["drop-cast"])
    assert load(["other"]).phases
    with pytest.warns(RewriterWarning, match=both):
        assert [info.name for info in catalogue()] == ["other"]


def test_same_set_in_two_packages(offer, texts):
    phases = "phases: [{name: a, rules: [drop-cast]}]"
    first = offer({"sets/x.yaml": phases, "sets/y.yaml": phases, "drop_cast.py": texts.plain})
    second = offer({"sets/x.yaml": phases})
    both = rf"several packages offer the rule set 'x': '{first}' and '{second}'; uninstall all but one"
    with pytest.raises(RuleSetError, match=both):
        load("x")
    assert load("y").phases
    with pytest.warns(RewriterWarning, match=both):
        assert list(rule_sets()) == ["y"]


def test_what_this_project_ships_is_not_taken_over(offer, texts, monkeypatch):
    theirs = offer({"drop_cast.py": "1 / 0", "sets/x.yaml": "{}"}, "toy_rules_aaa")
    shipped = offer({"drop_cast.py": texts.plain, "sets/x.yaml": "phases: [{name: a, rules: [drop-cast]}]"})
    monkeypatch.setattr(discover, "SHIPPED", shipped)
    with pytest.warns(RewriterWarning) as caught:
        assert load("x").phases
    assert {str(warning.message) for warning in caught} == {
        f"the {kind} of package '{theirs}' is skipped: '{shipped}' ships one of that name"
        for kind in ("rule 'drop-cast'", "rule set 'x'")
    }


def test_same_package_found_twice_is_one(offer, texts):
    name = offer({"drop_cast.py": texts.plain})
    offer({"drop_cast.py": texts.plain}, name)
    assert [info.name for info in catalogue()] == ["drop-cast"]


BROKEN = {
    "no function": ('"""A rule."""', "has no function 'rule'"),
    "no docstring": ("def rule(): ...", "has no docstring"),
    "fails to import": ('"""A rule."""\nimport nowhere', "cannot be imported: ModuleNotFoundError: No module"),
    "not keyword-only": ('"""A rule."""\ndef rule(x: int = 0): ...', "option 'x' must be keyword-only, with an annot"),
    "no default": ('"""A rule."""\ndef rule(*, x: int): ...', "option 'x' must be keyword-only, with an annotation"),
    "no annotation": ('"""A rule."""\ndef rule(*, x=0): ...', "option 'x' must be keyword-only, with an annotation"),
    "catch-all": ('"""A rule."""\ndef rule(**x: int): ...', "option 'x' must be keyword-only, with an annotation"),
    "unreadable annotation": ('"""A rule."""\ndef rule(*, x: "Nope" = 0): ...', "an annotation of 'rule' cannot be"),
    "annotation": (
        '"""A rule."""\ndef rule(*, x: set[int] = 0): ...',
        "option 'x' has a type that YAML cannot give: set",
    ),
}


@pytest.mark.parametrize(("text", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_rule_module(offer, text, message):
    name = offer({"bad.py": text})
    with pytest.raises(RuleSetError) as caught:
        load(PHASES)
    assert re.match(rf"rule bad \({name}\.bad\):? {re.escape(message)}", str(caught.value))
    assert "\n" not in str(caught.value)
    with pytest.warns(RewriterWarning, match=rf"a rule of package '{name}' is skipped: rule bad"):
        assert catalogue() == ()


def test_broken_rule_does_not_harm_the_others(offer, texts):
    offer({"bad.py": "import nowhere", "drop_cast.py": texts.plain})
    assert load(["drop-cast"]).phases[0].rules[0].name == "drop-cast"


def test_rule_that_makes_something_else(offer):
    offer({"bad.py": '"""A rule."""\ndef rule(): return [3]'})
    with pytest.raises(RuleSetError, match=r"^rule set .*: rule bad made a int, not an onnxscript rule$"):
        load(PHASES)


FAILING = {
    "raises": ("1 / 0", "ZeroDivisionError: division by zero"),
    "exits": ("import sys; sys.exit()", "SystemExit"),
    "exits with a code": ("raise SystemExit(0)", "SystemExit: 0"),
    "is not Python": ("def (:", "SyntaxError"),
    "has no module": ("import nowhere", "ModuleNotFoundError: No module named 'nowhere'"),
}


@pytest.mark.parametrize("place", ["__init__.py", "drop_cast.py"])
@pytest.mark.parametrize(("code", "words"), FAILING.values(), ids=FAILING.keys())
def test_a_package_that_fails_harms_who_names_it_alone(offer, texts, code, words, place):
    good = offer({"good.py": texts.plain, "sets/fine.yaml": "phases: [{name: a, rules: [good]}]"})
    bad = offer(
        {"drop_cast.py": texts.plain, "sets/broken.yaml": "phases: [{name: a, rules: [drop-cast]}]"} | {place: code}
    )
    assert load("fine").phases
    for wanted in (["drop-cast"], "broken"):
        with pytest.raises(RuleSetError, match=rf"^rule drop-cast \({bad}.drop_cast\) cannot be imported: {words}"):
            load(wanted)
    with pytest.warns(RewriterWarning, match=rf"a rule of package '{bad}' is skipped: .*{words}"):
        assert [info.package for info in catalogue()] == [good]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("textwrap", "it is not a package"),
        ("nowhere_at_all", "there is no such package"),
        ("nowhere.at.all", r"it cannot be found \(ModuleNotFoundError"),
        ("toy_rules_exits.inner", r"it cannot be found \(SystemExit"),
        ("", r"it cannot be found \(ValueError"),
    ],
)
def test_an_entry_point_that_leads_nowhere_is_skipped(offer, texts, monkeypatch, value, words):
    offer({"__init__.py": "raise SystemExit"}, "toy_rules_exits")
    good = offer({"good.py": texts.plain})
    entries = [SimpleNamespace(value=value), SimpleNamespace(value=good)]
    monkeypatch.setattr(discover, "metadata", SimpleNamespace(entry_points=lambda *, group: entries))
    with pytest.warns(RewriterWarning, match=rf"'{value}'( of group rewriter.rules)? is skipped: {words}"):
        assert load(["good"]).phases


def test_a_rule_that_exits_when_it_is_made_is_one_line(offer):
    offer({"bad.py": '"""A rule."""\nimport sys\ndef rule(): sys.exit()'})
    with pytest.raises(RuleSetError, match="rule bad refuses its options: SystemExit"):
        load(PHASES)


def test_nothing_installed(offer):
    assert catalogue() == () and rule_sets() == {}
    with pytest.raises(RuleSetError, match=r"^unknown rule set 'x' \(no installed package offers rules: "):
        load("x")
    with pytest.raises(RuleSetError, match=r"unknown rule 'x' \(no installed package offers rules: "):
        load(["x"])


def test_schema_lists_rules_and_options(offer, texts):
    offer({"drop_cast.py": texts.plain, "drop_identity.py": texts.identity})
    entries = json_schema()["$defs"]["PhaseDocument"]["properties"]["rules"]["items"]["anyOf"]
    assert [entry["const"] for entry in entries[:2]] == ["drop-cast", "drop-identity"]
    options = entries[3]["properties"]["drop-identity"]["properties"]
    assert options["accuracy_level"] == {"type": "integer", "default": 0, "description": "what it reaches for"}
    assert options["mode"] == {
        "type": "string",
        "enum": ["fast", "exact"],
        "default": "exact",
        "description": "fast or exact",
    }
    assert options["names"] == {"type": "array", "items": {"type": "string"}, "default": ()}


def test_rules_are_not_imported_statically():
    code = "import sys, rewriter.ruleset; assert not [name for name in sys.modules if name.split('.')[0] == 'rules']"
    subprocess.run([sys.executable, "-c", code], check=True)
