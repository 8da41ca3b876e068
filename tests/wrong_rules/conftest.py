"""Prints the wrong versions and what caught each, at the end of a run of this folder or of the gate."""

from __future__ import annotations

import os
import sys
from pathlib import Path

for folder in ("rules", "testing"):  # their models are these tests' models
    sys.path.append(str(Path(__file__).parents[1] / folder))


def pytest_terminal_summary(terminalreporter):
    own = Path(__file__).parent.name
    if "CI" not in os.environ and not any(own in str(argument) for argument in terminalreporter.config.args):
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
