"""The profiles of rewriter.testing; a package of rules of its own is tested by test_docs, which installs it."""

from __future__ import annotations

pytest_plugins = ["rewriter.testing.plugin"]
collect_ignore = ["example_package"]
