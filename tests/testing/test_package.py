"""package_tests and the pytest plugin: one line tests a package, and says in one line what is wrong with it."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import onnx_ir as ir
import pytest
from hypothesis import settings
from hypothesis import strategies as st

import rewriter.testing.plugin
from rewriter.errors import UsageError
from rewriter.ruleset import discover
from rewriter.testing import OrtRuntime, package_tests
from rewriter.testing.usage import name_of

EXAMPLE = Path(__file__).parents[1] / "example_package"
FEW = settings(max_examples=5, derandomize=True, database=None, deadline=None)
SET = "description: None.\nphases:\n  - name: only\n    rules: [{}]\n"


@pytest.fixture
def install(monkeypatch):
    """Returns a function that registers a package that lies in a folder."""
    entry_points = []

    def add(folder, name):
        entry_points.append(EntryPoint(name, name, discover.GROUP))
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.setattr(discover, "metadata", SimpleNamespace(entry_points=lambda *, group: entry_points))
        return name

    before = set(sys.modules)
    yield add
    for module in set(sys.modules) - before:
        if module.split(".")[0] in [entry.name for entry in entry_points]:
            del sys.modules[module]


@pytest.fixture
def example(install):
    return install(EXAMPLE, "example_rules")


def divisions():
    text = '<ir_version: 10, opset_import: ["" : 21]> g (float[2] x) => (float[2] y) <float c = {8}> { y = Div (x, c) }'
    return st.builds(lambda: ir.from_onnx_text(text))


def promises(test):
    """Id -> promise of a parametrized test."""
    (mark,) = test.pytestmark
    return {case.id: case.values[0] for case in mark.args[1]}


def test_each_rule_and_set_of_the_package_is_tested(example):
    found = promises(package_tests(example, {"div-to-mul": divisions()}, settings=FEW))
    names = ["page", "options", "check_rule", "near_misses"]
    assert list(found) == [*(f"div-to-mul-{name}" for name in names), "exact-divisions-loads"]
    for holds in found.values():
        holds()


@pytest.mark.parametrize(
    ("package", "models", "message"),
    [
        (
            "exampel_rules",
            {},
            r"names a package 'exampel_rules' \(did you mean 'example_rules'\?\); it wants the import name",
        ),
        (
            "example_rules",
            {"div-to-mul": divisions},
            r"models\['div-to-mul'\] must be a strategy, and 'divisions' is a function: write divisions\(\)",
        ),
        ("example_rules", {"div_to_mul": None}, r"no rule of package 'example_rules' \(did you mean 'div-to-mul'\?\)"),
    ],
)
def test_a_wrong_name_is_one_line(example, package, models, message):
    with pytest.raises(UsageError, match=message) as caught:
        package_tests(package, models)
    assert "\n" not in str(caught.value)


def test_a_test_may_be_left_out(example):
    assert "div-to-mul-near_misses" not in promises(package_tests(example, without=["div-to-mul-near_misses"]))
    with pytest.raises(UsageError, match=r"no test 'div-to-mul' to leave out \(did you mean 'div-to-mul-page'\?\)"):
        package_tests(example, without=["div-to-mul"])


def test_what_a_package_lacks_is_named(install, tmp_path):
    rule = (EXAMPLE / "example_rules" / "div_to_mul.py").read_text()
    folder = tmp_path / "lacking_rules"
    (folder / "sets").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "div_to_mul.py").write_text(
        rule.replace("Source:   ", "Sources:  ").replace("max_elements: a con", "a con")
    )
    (folder / "refuses.py").write_text('"""Refuses."""\n\n\ndef rule(*, size: int = 0):\n    raise ValueError(size)\n')
    (folder / "sets" / "wrong.yaml").write_text(SET.format("div-to-mull"))
    found = promises(package_tests(install(tmp_path, "lacking_rules")))
    messages = {
        "div-to-mul-page": r"the docstring of lacking_rules.div_to_mul has no section 'Source:'",
        "div-to-mul-options": r"option 'max_elements' of rule div-to-mul has no line in the Args of 'rule'",
        "refuses-page": r"no section 'Matched:', 'Replacement:', 'Declines when:', 'Source:'",
        "refuses-options": r"option 'size' of rule refuses has no line",
        "wrong-loads": r"wrong.yaml:4:13: unknown rule 'div-to-mull' \(did you mean 'div-to-mul'\?\)",
    }
    for name, message in messages.items():
        with pytest.raises(Exception, match=message):
            found[name]()


def test_a_rule_that_its_defaults_do_not_build_is_named(install, tmp_path):
    (tmp_path / "refusing_rules").mkdir()
    (tmp_path / "refusing_rules" / "__init__.py").write_text("")
    text = '"""Refuses."""\n\n\ndef rule(*, size: int = 0):\n    """Builds.\n\n    Args:\n        size: any.\n    """\n'
    (tmp_path / "refusing_rules" / "refuses.py").write_text(f"{text}    raise ValueError(size)\n")
    found = promises(package_tests(install(tmp_path, "refusing_rules")))
    with pytest.raises(Exception, match=r"the defaults of rule refuses .*refuses its options: ValueError: 0"):
        found["refuses-options"]()


def test_a_rule_that_calls_itself_otherwise_is_named(install, tmp_path):
    rule = (EXAMPLE / "example_rules" / "div_to_mul.py").read_text()
    (tmp_path / "naming_rules").mkdir()
    (tmp_path / "naming_rules" / "__init__.py").write_text("")
    (tmp_path / "naming_rules" / "div_to_mul.py").write_text(rule.replace('name="div-to-mul"', 'name="divide"'))
    found = promises(package_tests(install(tmp_path, "naming_rules")))
    with pytest.raises(AssertionError, match="rule div-to-mul calls itself 'divide'"):
        found["div-to-mul-options"]()


def test_what_to_write_for_a_rule_that_never_fires_is_what_works(example):
    text = '<ir_version: 10, opset_import: ["" : 21]> g (float[2] x) => (float[2] y) { y = Relu (x) }'
    never = promises(package_tests(example, {"div-to-mul": st.just(ir.from_onnx_text(text))}, settings=FEW))
    with pytest.raises(AssertionError, match="fired on none of the drawn models") as caught:
        never["div-to-mul-check_rule"]()
    _, _, code = str(caught.value).partition("tests the package:\n\n")
    names = {"package_tests": package_tests}
    exec(code, names)
    promises(names["test_rules"])["div-to-mul-check_rule"]()


# The plugin


def test_the_plugin_has_three_profiles():
    assert rewriter.testing.plugin.__doc__
    sizes = {name: settings.get_profile(name).max_examples for name in ("dev", "ci", "deep")}
    assert sizes == {"dev": 20, "ci": 60, "deep": 2000}


def run_pytest(folder, test, *arguments):
    (folder / "conftest.py").write_text('pytest_plugins = ["rewriter.testing.plugin"]\n')
    (folder / "test_it.py").write_text(test)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_the_command_line_chooses_the_profile(tmp_path):
    test = "from hypothesis import settings\n\n\ndef test_profile():\n    assert settings().max_examples == 2000\n"
    run_pytest(tmp_path, test, "--hypothesis-profile=deep")


@pytest.mark.parametrize("workers", ["0", "1"])
def test_statistics_tell_how_often_a_rule_fired_and_why_it_declined(tmp_path, workers):
    test = """
from hypothesis import settings
from rewriter.testing import check_rule, projections

def test_it():
    models = projections(placements=["main"], consumers=["left", "matmul"], max_size=16)  # smaller ones it seldom takes
    check_rule("matmul-to-matmul-nbits", models, settings=settings(derandomize=True, database=None))
"""
    shown = run_pytest(tmp_path, test, "--hypothesis-show-statistics", "-n", workers)
    _, _, shown = shown.partition("rules on the drawn models")
    assert "test_it.py::test_it\nmatmul-to-matmul-nbits: 20 models drawn\n" in shown
    assert re.search(r"\n +\d+  matmul-to-matmul-nbits fired\n", shown)
    assert re.search(r"\n +\d+  matmul-to-matmul-nbits declined: the weight is on the left", shown)


def test_a_package_is_tested_under_a_plan_and_a_judge_of_its_own(example, monkeypatch):
    seen = []

    def near_misses(rule, models, judge=None, settings=None):
        seen.append((rule, judge))

    monkeypatch.setattr("rewriter.testing.package.near_misses", near_misses)
    plan = {"default": {"bits": 8, "block_size": 64}}
    judge = OrtRuntime(optimize=False)
    found = promises(package_tests(example, {"div-to-mul": divisions()}, plan=plan, judge=judge, settings=FEW))
    found["div-to-mul-near_misses"]()
    assert seen == [({"phases": [{"name": "tested", "rules": ["div-to-mul"]}], "quantization": plan}, judge)]
    found["div-to-mul-check_rule"]()


def test_a_rule_set_is_called_by_its_rules_in_failures():
    rules = {"phases": [{"name": "a", "rules": ["unstack", {"moe-to-qmoe": {"accuracy_level": 4}}]}]}
    assert name_of(rules) == "unstack, moe-to-qmoe" and name_of({}) == "a rule set"
