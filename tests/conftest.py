"""The profiles of rewriter.testing, and the list of wrong rules at the end of a run of them or of the gate.

A package of rules of its own is tested by test_docs, which installs it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rewriter.cli import console
from rewriter.engine import purity

pytest_plugins = ["rewriter.testing.plugin"]
collect_ignore = ["example_package"]

HERE = Path(__file__).parent
LONG = (
    *("calibration", "cli", "golden", "io", "rules", "testing", "wrong_rules"),  # processes, whole models, drawn ones
    *(f"parity/test_{name}.py" for name in ("model", "quality", "stages", "weights", "widened", "worker")),
    *(f"quantize/test_{name}.py" for name in ("importance", "jobs", "llama_imatrix", "quantize_algorithms")),
    *("roles/test_roles_bodies.py", "roles/test_roles_models.py"),
    *("ruleset/test_ruleset_discovery.py", "target/test_prober.py", "target/test_written_forms.py"),
    *(f"test_{name}.py" for name in ("api", "budget", "compare", "docs", "examples", "explain", "html", "inspect")),
    *(f"test_{name}.py" for name in ("memory", "provenance", "public", "real_models", "weight_names")),
)
"""Folders and files that ``pytest -m quick`` leaves out."""
SHORT = ("rules/blocks",)
"""Folders of these that it takes."""


def pytest_collection_modifyitems(items):
    """Marks what is quick."""
    for item in items:
        if _in(item, SHORT) or not _in(item, LONG):
            item.add_marker("quick")


def _in(item, folders):
    return any(item.path.is_relative_to(HERE / name) for name in folders)


@pytest.fixture(autouse=True, scope="session")
def _no_lines_of_progress():
    """A busy machine is no reason for another output."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(console, "SECONDS", 1e6)
        yield


@pytest.fixture(autouse=True, scope="session")
def _pure_matches():
    """Every match of every test leaves the model as it was."""
    with purity.checked():
        yield


def pytest_terminal_summary(terminalreporter):
    """Prints what tests have counted; here, since workers collect, not this."""
    rows = [dict(r.user_properties) for r in terminalreporter.stats.get("passed", ())]
    if _asked(terminalreporter, "wrong_rules"):
        _wrong_rules(terminalreporter, rows)
    if _asked(terminalreporter, "target"):
        _written_forms(terminalreporter, [row["written forms"] for row in rows if "written forms" in row])


def _asked(terminalreporter, folder):
    return "CI" in os.environ or any(folder in str(a) for a in terminalreporter.config.args)


def _written_forms(terminalreporter, rows):
    """What rules write for each target, and what was measured of it."""
    if not rows:
        return
    terminalreporter.section("written forms")
    for name, count, known in sorted(rows, key=lambda row: row[0]):
        shown = ", ".join(f"{number} {verdict}" for verdict, number in sorted(known.items(), key=lambda item: -item[1]))
        terminalreporter.write_line(f"{name}: {count} ({shown})")
    terminalreporter.write_line(f"{sum(row[1] for row in rows)} forms written, none measured wrong or refused")


def _wrong_rules(terminalreporter, rows):
    """The wrong versions of the shipped rules and what caught each."""
    rows = [(row["rule"], row["wrong version"], row["caught by"]) for row in rows if "caught by" in row]
    if not rows:
        return
    rows = [("rule", "wrong version", "caught by"), *sorted(rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    terminalreporter.section("wrong rules")
    for rule, name, caught in rows:
        terminalreporter.write_line(f"{rule:{widths[0]}}  {name:{widths[1]}}  {caught}")
    terminalreporter.write_line(f"{len(rows) - 1} wrong versions, each caught")
