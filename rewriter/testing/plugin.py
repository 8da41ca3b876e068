"""Hypothesis profiles for tests of rules: ``pytest_plugins = ["rewriter.testing.plugin"]`` in a ``conftest.py``.

``dev`` holds by default; ``pytest --hypothesis-profile=ci`` gives more models, the same each time, and ``deep`` as many
as an idle machine has time for. No entry point loads this by itself: another project may have profiles of these names.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

settings.register_profile("dev", max_examples=20, deadline=None, suppress_health_check=_SLOW)
settings.register_profile("ci", max_examples=60, deadline=None, derandomize=True, suppress_health_check=_SLOW)
settings.register_profile("deep", max_examples=2000, deadline=None, suppress_health_check=_SLOW)
settings.load_profile("dev")
