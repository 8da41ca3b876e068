"""Hypothesis profiles for tests of rules: ``pytest_plugins = ["rewriter.testing.plugin"]`` in a ``conftest.py``.

``dev`` holds by default; ``pytest --hypothesis-profile=ci`` gives more models, the same each time, and ``deep`` as many
as an idle machine has time for. No entry point loads this by itself: another project may have profiles of these names.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

PROFILES = {"dev": (20, False), "ci": (60, True), "deep": (2000, False)}
"""Name -> how many models each test draws, and whether they are the same each time."""

for _name, (_examples, _same) in PROFILES.items():
    settings.register_profile(
        _name, max_examples=_examples, derandomize=_same, deadline=None, suppress_health_check=_SLOW
    )
settings.load_profile("dev")
