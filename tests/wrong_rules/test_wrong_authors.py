"""Whatever an author gets wrong, ``rewriter apply`` does not end with exit code 0, but where no proof can show it."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import onnx_ir as ir
import pytest
from support import parse
from wrong_blocks import ALL as WRONG

from rewriter.cli import main
from rewriter.ruleset import discover

MODULE = """
'''A wrong rule.'''
from onnxscript.rewriter import RewriteRule
from wrong_blocks import ALL as WRONG

def rule():
    '''Builds the rule.'''
    wrong = WRONG[{name!r}]
    return RewriteRule(wrong.pattern, wrong.rewrite, name={name!r})
"""
RULES = "description: A test.\nphases:\n  - {{name: test, rules: [{name}]}}\n"


@pytest.fixture
def apply(tmp_path, monkeypatch, capsys):
    """Runs the command with one of the rules, which a package offers; returns exit code and what went to stderr."""
    package = tmp_path / "site" / "wrong_authors_rules"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(package.parent))
    entry = EntryPoint("wrong", package.name, discover.GROUP)
    monkeypatch.setattr(discover, "metadata", SimpleNamespace(entry_points=lambda *, group: [entry]))
    monkeypatch.chdir(tmp_path)

    def run(name, *options):
        (package / f"{name.replace('-', '_')}.py").write_text(MODULE.format(name=name))
        (tmp_path / "rules.yaml").write_text(RULES.format(name=name))
        ir.save(parse(WRONG[name].model, domains=', "com.microsoft" : 1'), tmp_path / "model.onnx")
        code = main(["apply", "model.onnx", "-o", "out", "-r", "./rules.yaml", "--no-check", *options])
        return code, capsys.readouterr().err

    yield run
    for module in [m for m in sys.modules if m.startswith(package.name)]:
        del sys.modules[module]


@pytest.mark.parametrize("name", [name for name, wrong in WRONG.items() if not wrong.passes])
def test_a_wrong_rule_is_named_first_and_the_exit_code_is_not_0(name, apply):
    code, said = apply(name)
    assert code == WRONG[name].code, said
    assert name in said.splitlines()[0], said


@pytest.mark.parametrize("name", [name for name, wrong in WRONG.items() if wrong.passes])
def test_what_passes_is_below_the_tolerance_or_beyond_what_is_fed(name, apply):
    code, said = apply(name)
    assert code == 0, said


def test_one_of_many_is_found_where_all_are_run(apply):
    code, said = apply("wrong-for-one-of-many", "--parity", "all")
    assert code == 1 and "a31" in said


def test_the_list_is_long_enough():
    assert sum(not wrong.passes for wrong in WRONG.values()) >= 60
