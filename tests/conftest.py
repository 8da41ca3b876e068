"""The profiles of rewriter.testing, and the list of wrong rules at the end of a run of them or of the gate.

A package of rules of its own is tested by test_docs, which installs it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rewriter.engine import purity

pytest_plugins = ["rewriter.testing.plugin"]
collect_ignore = ["example_package"]

HERE = Path(__file__).parent
LONG = (
    *("cli", "golden", "rules", "testing", "wrong_rules"),  # processes, whole models, drawn ones
    *("parity/test_model.py", "roles/test_roles_bodies.py", "roles/test_roles_models.py"),
    *("test_api.py", "test_docs.py", "test_explain.py", "test_html.py", "test_inspect.py", "test_real_models.py"),
)
"""Folders and files that ``pytest -m quick`` leaves out."""


def pytest_collection_modifyitems(items):
    """Marks what is quick."""
    for item in items:
        if not any(item.path.is_relative_to(HERE / name) for name in LONG):
            item.add_marker("quick")


@pytest.fixture(autouse=True, scope="session")
def _pure_matches():
    """Every match of every test leaves the model as it was."""
    with purity.checked():
        yield


def pytest_terminal_summary(terminalreporter):
    """Prints the wrong versions of the shipped rules and what caught each; here, since workers collect, not this."""
    if "CI" not in os.environ and not any("wrong_rules" in str(a) for a in terminalreporter.config.args):
        return
    rows = [dict(r.user_properties) for r in terminalreporter.stats.get("passed", ())]
    rows = [(row["rule"], row["wrong version"], row["caught by"]) for row in rows if "caught by" in row]
    if not rows:
        return
    rows = [("rule", "wrong version", "caught by"), *sorted(rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    terminalreporter.section("wrong rules")
    for rule, name, caught in rows:
        terminalreporter.write_line(f"{rule:{widths[0]}}  {name:{widths[1]}}  {caught}")
    terminalreporter.write_line(f"{len(rows) - 1} wrong versions, each caught")
