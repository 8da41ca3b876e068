"""Hypothesis profiles for tests of rules: ``pytest_plugins = ["rewriter.testing.plugin"]`` in a ``conftest.py``.

``dev`` holds by default; ``pytest --hypothesis-profile=ci`` gives more models, the same each time, and ``deep`` as many
as an idle machine has time for. No entry point loads this by itself: another project may have profiles of these names.

``pytest --hypothesis-show-statistics`` prints what happened on the drawn models too: Hypothesis itself counts only in
tests that it is the decorator of.
"""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
from hypothesis import settings

from rewriter.testing.drawing import SLOW, watched

PROFILES = {"dev": (20, False), "ci": (60, True), "deep": (2000, False)}
"""Name -> how many models each test draws, and whether they are the same each time."""

_PROPERTY = "rewriter.testing"

_GATE = "CI" in os.environ
"""Whether this run decides on a change: then ``dev`` draws the same models each time too, as Hypothesis' own does."""

for _name, (_examples, _same) in PROFILES.items():
    _alike = _same or (_GATE and _name == "dev")
    settings.register_profile(
        _name, max_examples=_examples, derandomize=_alike, deadline=None, suppress_health_check=SLOW
    )
settings.load_profile("dev")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Keeps what the checks of a test see with its report, which reaches the summary from another process too."""
    with watched() as seen:
        try:
            return (yield)
        finally:
            item.user_properties += [(_PROPERTY, one.statistics()) for one in seen]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Prints how often each rule fired, and why it declined."""
    if not config.getoption("--hypothesis-show-statistics", False):
        return
    terminalreporter.section("rules on the drawn models")
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, ()):
            for name, text in report.user_properties:
                if name == _PROPERTY:
                    terminalreporter.write_line(f"{report.nodeid}\n{text}\n")
