"""Profiles of Hypothesis: dev, ci and deep."""

pytest_plugins = ["rewriter.testing.plugin"]
