"""``rewriter rules``: the catalogue."""

from __future__ import annotations

import json
import re

from rewriter import ruleset
from rewriter.report import SCHEMA_VERSION


def test_rules_lists_everything_that_is_installed(run):
    code, out, _ = run("rules")
    assert code == 0
    for name in (*(r.name for r in ruleset.catalogue()), *ruleset.rule_sets()):
        assert re.search(rf"^{name} +\S", out, re.MULTILINE), name


def test_rules_shows_one_in_full(run):
    out = run("rules", "matmul-to-matmul-nbits")[1]
    for words in ("Matched\n  MatMul(x, w)", "Replacement\n", "Declines when\n", "Source\n"):
        assert words in out
    assert re.search(r"accuracy_level +.*0, 1, 2, 3, 4 or null +null +0 leaves it to the runtime", out)
    out = run("rules", "experts-int8")[1]
    assert re.search(r"^plan +8 bits, blocks of 32, symmetric", out, re.MULTILINE)
    assert re.search(r"^unstack +unstack", out, re.MULTILINE)
    assert "role expert.*" in out
    out = run("rules", "unstack")[1]
    assert "rule, from package rewriter.rules" in out
    assert "rule set, from package rewriter.rules" in out


def test_long_lines_stay_indented_on_a_narrow_terminal(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = run("rules", "moe-to-qmoe")[1]
    shown = out[out.index("Matched") : out.index("Options")].splitlines()
    assert max(map(len, shown)) <= 80
    assert {line for line in shown if line[:1].strip()} == {"Matched", "Replacement", "Declines when", "Source"}


def test_rules_speaks_json(run):
    data = json.loads(run("rules", "--json")[1])
    assert data["schema_version"] == SCHEMA_VERSION
    assert [r["name"] for r in data["rules"]] == [r.name for r in ruleset.catalogue()]
    assert [r["name"] for r in data["rule_sets"]] == list(ruleset.rule_sets())
    one = json.loads(run("rules", "matmul-to-matmul-nbits", "--json")[1])
    assert one["rules"][0]["options"][0]["schema"]["anyOf"][0] == {"enum": [0, 1, 2, 3, 4], "type": "integer"}
    assert one["rule_sets"] == []
    assert json.loads(run("rules", "--schema")[1]) == ruleset.json_schema()
